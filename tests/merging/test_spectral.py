"""TSV-M, Iso-C and Iso-CTS against singular value decompositions in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from retex_cli.merging import matrices
from retex_cli.merging.memory import merge_tensors

SHAPES = {"tall": (150, 20), "wide": (20, 90), "square": (32, 32), "conv": (24, 3, 3, 3), "bias": (9,), "one": (1, 1)}


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(matrix, full_matrices=False)


def polar(matrix: Tensor) -> Tensor:
    left, _, right = svd(matrix)
    return left @ right


def reference_tsv_m(taus: Sequence[Tensor]) -> Tensor:
    """Algorithm 1 of arXiv 2412.00081."""
    parts = [svd(tau) for tau in taus]
    k = min(taus[0].shape) // len(taus)
    left = torch.cat([u[:, :k] for u, _, _ in parts], 1)
    right = torch.cat([v[:k] for _, _, v in parts])
    return polar(left) * torch.cat([s[:k] for _, s, _ in parts]) @ polar(right)


def reference_iso_c(taus: Sequence[Tensor]) -> Tensor:
    """Algorithm 1 of arXiv 2502.04959."""
    left, values, right = svd(sum(taus))  # type: ignore[arg-type]
    return values.mean() * left @ right


def reference_iso_cts(taus: Sequence[Tensor], common: float = 0.8) -> Tensor:
    """Algorithm 2 of arXiv 2502.04959, with the rounding of the authors' code."""
    rank, tasks = min(taus[0].shape), len(taus)
    own = round((rank - int(rank * common)) / tasks)
    shared = rank - own * tasks
    u, s, v = (part for part in svd(sum(taus)))  # type: ignore[arg-type]
    u, s, v = u[:, :shared], s[:shared], v[:shared]
    parts = [svd(tau - u @ u.T @ tau) for tau in taus]
    left = torch.cat([*(part[0][:, :own] for part in parts), u], 1)
    right = torch.cat([*(part[2][:own] for part in parts), v])
    return torch.cat([*(part[1][:own] for part in parts), s]).mean() * polar(left) @ polar(right)


REFERENCES = {"tsv_m": reference_tsv_m, "iso_c": reference_iso_c, "iso_cts": reference_iso_cts}


def as_matrices(base: dict[str, Tensor], experts: dict[str, dict[str, Tensor]], name: str) -> list[Tensor]:
    return [(expert[name] - base[name]).flatten(1).double() for expert in experts.values()]


@pytest.mark.parametrize("method", REFERENCES)
@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_they_equal_their_papers_to_one_in_a_hundred_thousand(
    make_models: Callable[..., tuple], method: str, tasks: int
) -> None:
    base, experts = make_models(tasks=tasks, shapes=SHAPES)
    merged = merge_tensors(method, base, experts, {"alpha": 0.7})
    for name in ("tall", "wide", "square", "conv"):
        wanted = 0.7 * REFERENCES[method](as_matrices(base, experts, name))
        found = (merged[name] - base[name]).flatten(1).double()
        assert (found - wanted).norm() / wanted.norm() < 1e-5


@pytest.mark.parametrize("method", REFERENCES)
def test_blocks_of_rows_give_the_same_merge(
    make_models: Callable[..., tuple], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = make_models(tasks=3, shapes=SHAPES)
    whole = merge_tensors(method, base, experts)
    monkeypatch.setattr(matrices, "CELL_ELEMENTS", 100)
    cut = merge_tensors(method, base, experts)
    for name in base:
        torch.testing.assert_close(cut[name], whole[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", REFERENCES)
def test_what_is_no_matrix_is_averaged(make_models: Callable[..., tuple], method: str) -> None:
    base, experts = make_models(tasks=3, shapes=SHAPES)
    merged = merge_tensors(method, base, experts)
    mean = torch.stack([expert["bias"] for expert in experts.values()]).mean(0)
    torch.testing.assert_close(merged["bias"], mean)


def test_iso_c_worked_by_hand() -> None:
    """The summed task vectors are diag(3, 1): singular values 3 and 1 become 2 and 2."""
    experts = {"a": {"w": torch.diag(torch.tensor([3.0, 0.0]))}, "b": {"w": torch.diag(torch.tensor([0.0, 1.0]))}}
    merged = merge_tensors("iso_c", {"w": torch.zeros(2, 2)}, experts)["w"]
    torch.testing.assert_close(merged, 2 * torch.eye(2))


def test_tsv_m_worked_by_hand() -> None:
    """Of each task one component of two stays: 3 e1 e1^T and 2 e2 e2^T. They are orthogonal already and add up."""
    experts = {"a": {"w": torch.diag(torch.tensor([3.0, 1.0]))}, "b": {"w": torch.diag(torch.tensor([1.0, 2.0]))}}
    merged = merge_tensors("tsv_m", {"w": torch.zeros(2, 2)}, experts)["w"]
    torch.testing.assert_close(merged, torch.diag(torch.tensor([3.0, 2.0])))


def test_iso_cts_worked_by_hand() -> None:
    """Three dimensions, one common: the sum is diag(6, 1, 2), e1 is common. Outside of it a has 1 in e2, b 2 in e3.

    Values 6, 1 and 2 become 3 each.
    """
    experts = {
        "a": {"w": torch.diag(torch.tensor([3.0, 1.0, 0.0]))},
        "b": {"w": torch.diag(torch.tensor([3.0, 0.0, 2.0]))},
    }
    merged = merge_tensors("iso_cts", {"w": torch.zeros(3, 3)}, experts, {"common": 0.4})["w"]
    torch.testing.assert_close(merged, 3 * torch.eye(3))


@pytest.mark.parametrize("method", REFERENCES)
def test_task_vectors_of_low_rank_stay_in_their_span(method: str) -> None:
    """LoRA experts: directions without a singular value are rounding, and must not enter by the polar factor."""
    draw = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(40, 30, generator=draw)}
    factors = [(torch.randn(40, 2, generator=draw), torch.randn(2, 30, generator=draw)) for _ in range(3)]
    experts = {str(t): {"w": base["w"] + 0.1 * b @ a} for t, (b, a) in enumerate(factors)}
    delta = (merge_tensors(method, base, experts)["w"] - base["w"]).double()
    span = torch.linalg.qr(torch.cat([b for b, _ in factors], 1).double())[0]
    assert (delta - span @ (span.T @ delta)).norm() < 1e-3 * delta.norm()
    assert delta.norm() > 0.1
