"""EMR, Consensus and SCE against their papers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from retex_cli.merging.memory import merge_tensors

ZERO = {"w": torch.zeros(4)}
THREE = {
    "a": {"w": torch.tensor([1.0, -2.0, 3.0, 1.0])},
    "b": {"w": torch.tensor([2.0, 1.0, -1.0, -1.0])},
    "c": {"w": torch.tensor([-1.0, -1.0, 2.0, 0.0])},
}


def stack(base: dict[str, Tensor], experts: dict[str, dict[str, Tensor]], name: str) -> Tensor:
    """float64 [T, n] of the float32 differences."""
    return torch.stack([(expert[name] - base[name]).flatten().double() for expert in experts.values()])


def test_emr_worked_by_hand() -> None:
    """Sums 2, -2, 4, 0: signs + - + none; the largest magnitudes with them are 2, 2, 3."""
    assert merge_tensors("emr", ZERO, THREE)["w"].tolist() == [2.0, -2.0, 3.0, 0.0]


def test_emr_equals_the_paper_in_float64(make_models: Callable[..., tuple]) -> None:
    base, experts = make_models(tasks=4)
    merged = merge_tensors("emr", base, experts)
    for name, weights in base.items():
        taus = stack(base, experts, name)
        sign = taus.sum(0).sign()
        agreeing = torch.where(taus.sign() == sign, taus.abs(), torch.zeros_like(taus))
        wanted = weights.flatten().double() + sign * agreeing.max(0).values if weights.numel() else taus.sum(0)
        torch.testing.assert_close(merged[name].flatten().double(), wanted, rtol=1e-6, atol=1e-6)


def test_consensus_worked_by_hand() -> None:
    """Lambda 0.5. Sums 2, -2, 4, 0. Entry 1: |1| >= .5 |1|, |2| >= 0, |-1| < .5 |3|: two tasks, kept.

    Entry 2: 2 >= 0, 1 < 1.5, 1 >= .5: two, kept. Entry 3: 3 >= .5, 1 < 2.5, 2 >= 1: two, kept. Entry 4: the sum is 0.
    With three tasks asked for, nothing is left but zeros.
    """
    options = {"tall_lambda": 0.5, "alpha": 1}
    assert merge_tensors("consensus", ZERO, THREE, options)["w"].tolist() == [2.0, -2.0, 4.0, 0.0]
    strict = merge_tensors("consensus", ZERO, THREE, {**options, "agreement": 3})
    assert strict["w"].tolist() == [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("agreement", [0, 1, 2, 5])
def test_consensus_equals_the_paper_in_float64(make_models: Callable[..., tuple], agreement: int) -> None:
    base, experts = make_models(tasks=4)
    merged = merge_tensors("consensus", base, experts, {"agreement": agreement, "alpha": 0.3, "tall_lambda": 0.6})
    for name, weights in base.items():
        taus = stack(base, experts, name)
        total = taus.sum(0)
        votes = (taus.abs() >= 0.6 * (total - taus).abs()).sum(0)
        wanted = weights.flatten().double() + 0.3 * total * (votes >= agreement)
        torch.testing.assert_close(merged[name].flatten().double(), wanted, rtol=1e-6, atol=1e-6)


def test_sce_worked_by_hand() -> None:
    """Two tasks, two of four entries selected: those with the largest variance, the first (9) and the third (4).

    Energies there: a 16 + 1 = 17, b 4 + 9 = 13, so weights 17/30 and 13/30. Entry 1: 4 and -2, the sum is positive, a
    alone is left: 4. Entry 3: -1 and 3, b alone is left: 3.
    """
    experts = {
        "a": {"w": torch.tensor([4.0, 1.0, -1.0, 1.0])},
        "b": {"w": torch.tensor([-2.0, 1.0, 3.0, 2.0])},
    }
    merged = merge_tensors("sce", ZERO, experts, {"density": 0.5})["w"]
    torch.testing.assert_close(merged, torch.tensor([4.0, 0.0, 3.0, 0.0]))
    everything = merge_tensors("sce", ZERO, experts, {"density": 1})["w"]
    a, b = 16 + 1 + 1 + 1, 4 + 1 + 9 + 4
    torch.testing.assert_close(everything, torch.tensor([4.0, 1.0, 3.0, (a * 1 + b * 2) / (a + b)]))


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_sce_equals_the_paper_in_float64(make_models: Callable[..., tuple], density: float) -> None:
    base, experts = make_models(tasks=4)
    merged = merge_tensors("sce", base, experts, {"density": density})
    for name, weights in base.items():
        taus, n = stack(base, experts, name), weights.numel()
        if not n:
            continue
        variance = taus.var(0, unbiased=False)
        cut = variance.sort(descending=True).values[max(1, int(density * n)) - 1]
        taus = taus * (variance >= cut)
        energy = taus.square().sum(1) / taus.square().sum()
        kept = (taus * taus.sum(0).sign()) > 0
        weight = energy[:, None] * kept
        wanted = weights.flatten().double() + (weight * taus).sum(0) / weight.sum(0).clamp(min=1e-30)
        torch.testing.assert_close(merged[name].flatten().double(), wanted, rtol=1e-5, atol=1e-6)
