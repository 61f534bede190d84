"""PCB-Merging against the authors' definition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from retex_cli.merging.memory import merge_tensors


def reference_pcb(taus: Tensor, density: float) -> Tensor:
    """Merged task vector of whole task vectors ``taus [T, d]`` in float64."""
    tasks, d = taus.shape

    def clamped(x: Tensor, low: float, high: float) -> Tensor:
        ordered = x.sort(1).values
        return x.clamp(ordered[:, int(d * low), None], ordered[:, max(int(d * (1 - high) - 1), 0), None])

    def scaled(x: Tensor) -> Tensor:
        low, high = x.min(1, keepdim=True).values, x.max(1, keepdim=True).values
        return (x - low) / (high - low)

    magnitude = clamped(taus.abs(), 1e-4, 1e-4)
    score = torch.exp(tasks * scaled(magnitude) ** 2) * torch.tanh(taus * taus.sum(0))
    weight = scaled(clamped(score, 1 - density, 0))
    return (taus.sign() * magnitude * weight).sum(0) / weight.sum(0).clamp(min=1e-12)


def test_pcb_worked_by_hand() -> None:
    """One task, (1, 2, 4), everything kept: s = (0, 1/3, 1), scores e^(s^2) tanh(tau^2), scaled to 0 .. 1, are weights.

    A weighted mean over one task is the task vector itself wherever the weight is not 0: (0, 2, 4). Of magnitudes, the
    smallest and largest bound the clamp: for three entries the bounds are the first and the last but one, (1, 2).
    """
    merged = merge_tensors("pcb", {"w": torch.zeros(3)}, {"a": {"w": torch.tensor([1.0, 2.0, 4.0])}}, {"density": 1})
    torch.testing.assert_close(merged["w"], torch.tensor([0.0, 2.0, 2.0]))


@pytest.mark.parametrize("density", [0.05, 0.2, 0.9])
@pytest.mark.parametrize("tasks", [2, 5])
def test_pcb_equals_the_authors_formula_in_float64(
    make_models: Callable[..., tuple], density: float, tasks: int
) -> None:
    base, experts = make_models(tasks=tasks)
    merged = merge_tensors("pcb", base, experts, {"density": density, "alpha": 0.8})
    taus = torch.stack([torch.cat([(e[n] - base[n]).flatten() for n in base]).double() for e in experts.values()])
    wanted = torch.cat([w.flatten() for w in base.values()]).double() + 0.8 * reference_pcb(taus, density)
    found = torch.cat([w.flatten() for w in merged.values()]).double()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_scores_of_many_tasks_do_not_overflow(make_models: Callable[..., tuple]) -> None:
    base, experts = make_models(tasks=120, shapes={"w": (50,)})
    assert merge_tensors("pcb", base, experts)["w"].isfinite().all()
