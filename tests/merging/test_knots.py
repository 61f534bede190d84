"""KnOTS against a singular value decomposition in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from retex_cli.merging.memory import merge_tensors


def reference_ties(taus: Tensor, density: float) -> Tensor:
    """Trim, elect, disjoint mean of ``taus [T, n]`` in float64."""
    k = max(1, int(density * taus.shape[1]))
    cut = taus.abs().sort(1, descending=True).values[:, k - 1, None]
    taus = torch.where(taus.abs() >= cut, taus, torch.zeros_like(taus))
    kept = (taus * taus.sum(0).sign()) > 0
    return (taus * kept).sum(0) / kept.sum(0).clamp(min=1)


def reference_knots(taus: list[Tensor], density: float) -> Tensor:
    """``[tau_1 .. tau_T] = U S [V_1 .. V_T]``, TIES over ``S V_t``, times ``U``."""
    left, values, right = torch.linalg.svd(torch.cat(taus, 1), full_matrices=False)
    rank = int((values > 1e-5 * values[0]).sum())
    parts = (values[:rank, None] * right[:rank]).split(taus[0].shape[1], dim=1)
    merged = reference_ties(torch.stack([part.flatten() for part in parts]), density)
    return left[:, :rank] @ merged.view(rank, -1)


def lora(shape: tuple[int, int], tasks: int, rank: int) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    draw = torch.Generator().manual_seed(3)
    base = {"w": torch.randn(shape, generator=draw)}
    experts = {
        f"task{t}": {
            "w": base["w"] + torch.randn(shape[0], rank, generator=draw) @ torch.randn(rank, shape[1], generator=draw)
        }
        for t in range(tasks)
    }
    return base, experts


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (200, 10)])
@pytest.mark.parametrize("rank", [2, 10])
def test_it_equals_the_paper_in_float64(shape: tuple[int, int], rank: int) -> None:
    base, experts = lora(shape, 3, rank)
    merged = merge_tensors("knots", base, experts, {"alpha": 1})["w"]
    taus = [(expert["w"] - base["w"]).double() for expert in experts.values()]
    wanted = reference_knots(taus, 0.2)
    found = (merged - base["w"]).double()
    assert (found - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("shape", [(30, 20), (200, 10)])
def test_a_linear_inner_method_needs_no_alignment(shape: tuple[int, int]) -> None:
    """The basis is orthonormal, so averages in it are averages outside of it: the detour must change nothing."""
    base, experts = lora(shape, 3, 2)
    aligned = merge_tensors("knots", base, experts, {"inner": "average"})["w"]
    torch.testing.assert_close(aligned, merge_tensors("average", base, experts)["w"], rtol=1e-5, atol=1e-5)


def test_knots_worked_by_hand() -> None:
    """Task vectors 2 e1 e1^T and e1 e2^T share the left vector e1: coordinates (2, 0) and (0, 1), merged to (2, 1)."""
    experts = {
        "a": {"w": torch.tensor([[2.0, 0.0], [0.0, 0.0]])},
        "b": {"w": torch.tensor([[0.0, 1.0], [0.0, 0.0]])},
    }
    merged = merge_tensors("knots", {"w": torch.zeros(2, 2)}, experts, {"density": 1, "alpha": 0.5})["w"]
    torch.testing.assert_close(merged, torch.tensor([[1.0, 0.5], [0.0, 0.0]]))


def test_tensors_without_a_task_vector_and_vectors(make_models: Callable[..., tuple]) -> None:
    base, experts = make_models(tasks=2, shapes={"matrix": (9, 5), "bias": (6,)})
    experts = {task: {**expert, "matrix": base["matrix"]} for task, expert in experts.items()}
    merged = merge_tensors("knots", base, experts, {"density": 0.5, "alpha": 1})
    assert torch.equal(merged["matrix"], base["matrix"])
    plain = merge_tensors("ties", base, experts, {"density": 0.5, "scope": "tensor"})
    assert torch.equal(merged["bias"], plain["bias"])
