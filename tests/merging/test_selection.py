"""The streamed k-th largest magnitude is the one that sorting gives, on friendly and on hostile data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from retex_cli.merging import selection
from retex_cli.merging.memory import Held
from retex_cli.merging.selection import (
    Bounds,
    Population,
    bracket,
    keep_count,
    order_statistics,
    shrink_bound,
    top_magnitudes,
)
from retex_cli.merging.view import View


def view_of(*taus: Tensor, name: str = "w") -> View:
    zero = Held("base", torch.zeros_like(taus[0]))
    tasks = tuple(f"task{t}" for t in range(len(taus)))
    sources = tuple(Held(task, tau) for task, tau in zip(tasks, taus, strict=True))
    return View(name, tuple(taus[0].shape), tasks, zero, sources)


def by_sorting(tau: Tensor, density: float) -> float:
    return float(tau.flatten().abs().sort(descending=True).values[keep_count(tau.numel(), density) - 1])


def data(kind: str, n: int) -> Tensor:
    draw = torch.Generator().manual_seed(n)
    normal = torch.randn(n, generator=draw)
    return {
        "normal": normal,
        "heavy": normal**5,
        "rows": normal * (torch.arange(n) // 768 % 5 == 0),  # most rows untouched
        "last rows": normal * (torch.arange(n) > 0.9 * n),  # nothing but zeros where most samples fall
        "lattice": (normal * 3).round() / 64,  # what the difference of bfloat16 weights looks like
        "equal": torch.full((n,), 0.5),
        "zero": torch.zeros(n),
        "rising": torch.linspace(0, 1, n) ** 3,
    }[kind]


@pytest.mark.parametrize("kind", ["normal", "heavy", "rows", "last rows", "lattice", "equal", "zero", "rising"])
@pytest.mark.parametrize("density", [0.01, 0.2, 0.95])
def test_it_is_the_true_order_statistic(kind: str, density: float) -> None:
    tau = data(kind, 300_000)
    assert top_magnitudes([view_of(tau, -tau.flip(0))], density) == {
        "task0": by_sorting(tau, density),
        "task1": by_sorting(tau, density),
    }


@pytest.mark.parametrize("n", [1, 2, 50, 4097])
def test_small_tensors_keep_at_least_one_entry(n: int) -> None:
    tau = data("normal", n)
    for density in (0.0, 0.3, 1.0):
        found = top_magnitudes([view_of(tau)], density)["task0"]
        assert int((tau.abs() >= found).sum()) == (n if density == 1 else max(1, int(density * n)))


def test_an_empty_tensor_keeps_nothing() -> None:
    assert keep_count(0, 0.5) == 0
    assert top_magnitudes([view_of(torch.empty(0))], 0.5) == {"task0": float("inf")}


@pytest.mark.parametrize("kind", ["normal", "lattice", "equal"])
def test_several_ranks_of_values_of_both_signs(kind: str) -> None:
    tau = data(kind, 280_000)
    signed = Population(lambda view: ("value",), lambda view, base, experts: experts.sub_(base))
    ordered = tau.sort(descending=True).values
    for room in (1 << 24, 10):
        found = order_statistics([replace(view_of(tau), room=room)], lambda _, n: (1, n // 3, 0, n), signed)["value"]
        assert found == (ordered[0], ordered[280_000 // 3 - 1], float("inf"), ordered[-1])


def test_several_tensors_form_one_population() -> None:
    parts = [data("normal", 200_000), 10 * data("normal", 90_000), data("zero", 1000)]
    found = top_magnitudes([view_of(part, name=str(i)) for i, part in enumerate(parts)], 0.1)
    assert found == {"task0": by_sorting(torch.cat(parts), 0.1)}


def test_a_bracket_that_misses_costs_time_and_not_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    tau = data("normal", 300_000)
    for wrong in (Bounds(2.0, 3.0), Bounds(0.0, 0.1), Bounds(0.5, 0.5, tied=True)):
        monkeypatch.setattr(selection, "bracket", lambda runs, share, wrong=wrong: wrong)
        assert top_magnitudes([view_of(tau)], 0.2) == {"task0": by_sorting(tau, 0.2)}


def test_more_values_than_may_be_held_are_counted_instead() -> None:
    tau = data("heavy", 300_000)
    assert top_magnitudes([replace(view_of(tau), room=10)], 0.2) == {"task0": by_sorting(tau, 0.2)}


def test_a_bracket_is_narrow_and_holds_the_quantile() -> None:
    values = data("normal", 1 << 16).abs().numpy()
    found = bracket(np.split(values, 64), 0.2)
    low, high = found.low, found.high
    assert low < float(np.quantile(values, 0.8)) < high
    assert np.mean((values > low) & (values <= high)) < 0.05


def test_the_bound_below_a_threshold_lets_exactly_it_through() -> None:
    for threshold in (0.0, 1e-45, 0.1, 3.0):
        bound = shrink_bound(float(np.float32(threshold)))
        values = torch.tensor([threshold, bound])
        assert torch.hardshrink(values, bound)[0] == values[0]
        if threshold > 0:
            assert torch.hardshrink(values, bound)[1] == 0
