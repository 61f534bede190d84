"""Fisher and RegMean against their formulas, with statistics from made-up inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from retex_cli.merging.memory import merge_tensors


def test_fisher_worked_by_hand() -> None:
    """Weights 1 and 3, Fisher information 3 and 1: (3 * 1 + 1 * 3) / 4; where both are 0 the floor gives the mean."""
    experts = {"a": {"w": torch.tensor([1.0, 1.0])}, "b": {"w": torch.tensor([3.0, 3.0])}}
    fisher = {"a": {"w": torch.tensor([3.0, 0.0])}, "b": {"w": torch.tensor([1.0, 0.0])}}
    merged = merge_tensors("fisher", {"w": torch.zeros(2)}, experts, {"normalise": False}, statistics=fisher)
    assert merged["w"].tolist() == [1.5, 2.0]


@pytest.mark.parametrize("normalise", [True, False])
def test_fisher_equals_its_formula_in_float64(make_models: Callable[..., tuple], normalise: bool) -> None:
    base, experts = make_models(tasks=3)
    draw = torch.Generator().manual_seed(5)
    fisher = {t: {n: torch.rand(w.shape, generator=draw) for n, w in base.items()} for t in experts}
    merged = merge_tensors("fisher", base, experts, {"normalise": normalise}, statistics=fisher)
    norms = {t: torch.cat([f.flatten() for f in fs.values()]).double().norm() for t, fs in fisher.items()}
    for name in base:
        weights = [fisher[t][name].double().clamp(min=1e-6) / (norms[t] if normalise else 1) for t in experts]
        total = sum(w * experts[t][name].double() for w, t in zip(weights, experts, strict=True))
        torch.testing.assert_close(merged[name].double(), total / sum(weights), rtol=1e-5, atol=1e-6)


def inputs(tasks: list[str], size: int, rows: int = 60) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(6)
    return {t: torch.randn(rows, size, generator=draw) * torch.rand(size, generator=draw) for t in tasks}


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_regmean_minimises_the_distance_of_outputs(make_models: Callable[..., tuple], shape: tuple[int, int]) -> None:
    """With shrink 1 it is least squares: the merged layer's outputs are closest to every expert's on its own inputs."""
    base, experts = make_models(tasks=3, shapes={"w": shape})
    xs = inputs(list(experts), shape[1])
    grams = {t: {"w": x.T @ x} for t, x in xs.items()}
    merged = merge_tensors("regmean", base, experts, {"shrink": 1}, statistics=grams)["w"]
    stacked = torch.cat([x.double() for x in xs.values()])
    targets = torch.cat([x.double() @ experts[t]["w"].double().T for t, x in xs.items()])
    wanted = torch.linalg.lstsq(stacked, targets).solution.T
    torch.testing.assert_close(merged.double(), wanted, rtol=1e-4, atol=1e-5)


def test_regmean_equals_the_paper_in_float64(make_models: Callable[..., tuple]) -> None:
    base, experts = make_models(tasks=3, shapes={"w": (12, 7), "b": (7,)})
    grams = {t: x.T @ x for t, x in inputs(list(experts), 7).items()}
    merged = merge_tensors("regmean", base, experts, statistics={t: {"w": g} for t, g in grams.items()})
    shrunk = {t: 0.9 * g.double() + 0.1 * torch.diag(g.diagonal()).double() for t, g in grams.items()}
    total = sum(shrunk[t] @ experts[t]["w"].double().T for t in experts)
    wanted = (torch.linalg.inv(sum(shrunk.values())) @ total).T  # type: ignore[arg-type]
    torch.testing.assert_close(merged["w"].double(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(merged["b"], merge_tensors("average", base, experts)["b"]), "no statistics: averaged"


def test_regmean_worked_by_hand() -> None:
    """One weight, inputs 1 and 2 with weights 10 and 0: (1 * 10 + 4 * 0) / (1 + 4) = 2."""
    experts = {"a": {"w": torch.tensor([[10.0]])}, "b": {"w": torch.tensor([[0.0]])}}
    grams = {"a": {"w": torch.tensor([[1.0]])}, "b": {"w": torch.tensor([[4.0]])}}
    merged = merge_tensors("regmean", {"w": torch.zeros(1, 1)}, experts, statistics=grams)
    torch.testing.assert_close(merged["w"], torch.tensor([[2.0]]))


def test_directions_that_no_input_took_keep_the_base(make_models: Callable[..., tuple]) -> None:
    base, experts = make_models(tasks=2, shapes={"w": (5, 6)})
    xs = {t: torch.cat([x[:, :4], torch.zeros(60, 2)], 1) for t, x in inputs(list(experts), 6).items()}
    grams = {t: {"w": x.T @ x} for t, x in xs.items()}
    merged = merge_tensors("regmean", base, experts, {"shrink": 1}, statistics=grams)["w"]
    torch.testing.assert_close(merged[:, 4:], base["w"][:, 4:])
    assert merged.isfinite().all()
