"""Breadcrumbs and DELLA against their papers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from retex_cli.merging.masks import draws, keys
from retex_cli.merging.memory import merge_tensors
from retex_cli.merging.prune import magnitude_ranks


def test_breadcrumbs_worked_by_hand() -> None:
    """Ten entries; the largest (10 %) goes, the next three (30 %) stay: -9, 8 and 7 of 10, -9, 8, 7 ...; times 0.5."""
    tau = torch.tensor([1.0, 10, -9, 2, 8, 3, 7, -4, 5, 6])
    merged = merge_tensors(
        "breadcrumbs", {"w": torch.ones(10)}, {"a": {"w": 1 + tau}}, {"density": 0.3, "gamma": 0.1, "alpha": 0.5}
    )["w"]
    assert (merged - 1).tolist() == [0, 0, -4.5, 0, 4, 0, 3.5, 0, 0, 0]


@pytest.mark.parametrize(("density", "gamma"), [(0.1, 0.01), (0.5, 0.0), (0.9, 0.5), (1.0, 0.2)])
def test_breadcrumbs_equals_the_paper_in_float64(
    make_models: Callable[..., tuple], density: float, gamma: float
) -> None:
    base, experts = make_models(tasks=3)
    merged = merge_tensors("breadcrumbs", base, experts, {"density": density, "gamma": gamma, "alpha": 0.3})
    for name, weights in base.items():
        total = torch.zeros(weights.numel(), dtype=torch.float64)
        n = weights.numel()
        kept = min(n, max(1, int(density * n)))
        outliers = min(int(gamma * n), n - kept)
        for expert in experts.values():
            tau = (expert[name] - weights).flatten().double()
            order = tau.abs().argsort(descending=True)[outliers : outliers + kept]
            total[order] += tau[order]
        wanted = weights.flatten().double() + 0.3 * total
        torch.testing.assert_close(merged[name].flatten().double(), wanted, rtol=1e-6, atol=1e-6)


def test_ranks_are_those_of_sorting_and_ties_go_by_column() -> None:
    rows = torch.tensor([[3.0, -1.0, 2.0, 1.0], [0.0, -5.0, 5.0, -0.0]])
    assert magnitude_ranks(rows).tolist() == [[3, 0, 2, 1], [0, 2, 3, 1]]
    many = torch.randn(50, 333, generator=torch.Generator().manual_seed(0))
    assert torch.equal(magnitude_ranks(many).long(), many.abs().argsort(1).argsort(1))


def test_della_keeps_large_entries_more_often() -> None:
    """One row of n: the entry of rank r is kept with probability 0.5 + 0.4 (r / (n - 1) - 1/2)."""
    n = 200_001
    merged = merge_tensors(
        "della",
        {"w": torch.zeros(n)},
        {"a": {"w": torch.arange(1.0, n + 1) / n}},
        {"density": 0.5, "window": 0.4, "alpha": 1},
    )["w"]
    kept = (merged != 0).double()
    tenth, half = n // 10, n // 2
    for part, share in ((kept[:tenth], 0.32), (kept[half - tenth : half + tenth], 0.5), (kept[-tenth:], 0.68)):
        assert abs(part.mean().item() - share) < 0.015
    assert abs(merged.double().mean().item() - 0.5) < 0.005, "rescaling keeps the mean"


def reference_della(taus: Tensor, draws: Tensor, density: float, window: float) -> Tensor:
    """Merged task vector of ``taus [T, m, n]``, with 16-bit ``draws`` in the place of the paper's random numbers."""
    count = taus.shape[2]
    rank = taus.abs().argsort(dim=2, stable=True).argsort(2).double()  # equal magnitudes by column, as ours
    keep = density + window * (rank / max(count - 1, 1) - 0.5) if count > 1 else torch.full_like(taus, density)
    pruned = torch.where(draws.double() < (keep.float() * 2**16).round().double(), taus / keep, torch.zeros_like(taus))
    agree = (pruned * pruned.sum(0).sign()) > 0
    return (pruned * agree).sum(0) / agree.sum(0).clamp(min=1)


def test_della_equals_the_paper_in_float64(make_models: Callable[..., tuple]) -> None:
    base, experts = make_models(tasks=3)
    merged = merge_tensors("della", base, experts, {"density": 0.6, "window": 0.2, "alpha": 1.1})
    for name, weights in base.items():
        if not weights.numel():
            continue
        rows = weights.flatten(1) if weights.dim() > 1 else weights[None]
        taus = torch.stack([(e[name] - weights).view(rows.shape).double() for e in experts.values()])
        drawn = torch.from_numpy(draws(keys(0, name, sorted(experts)), 0, weights.numel()).astype(int))
        delta = reference_della(taus, drawn.view_as(taus), 0.6, 0.2)
        wanted = (rows.double() + 1.1 * delta).view(weights.shape)
        torch.testing.assert_close(merged[name].double(), wanted, rtol=1e-5, atol=1e-6)
