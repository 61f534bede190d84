"""PCB-Merging: parameters compete within their task and across tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from retex_cli.merging.linear import sum_rows
from retex_cli.merging.selection import Population, order_statistics
from retex_cli.merging.view import Kernel, View

OUTLIERS = 1e-4
"""Share of smallest and of largest magnitudes that are clamped before they are scaled to 0 .. 1."""


@dataclass(frozen=True)
class Range:
    """One task's bounds over the whole model: of clamped magnitudes, and of the scores that are kept."""

    low: float
    high: float
    cut: float = 0.0
    top: float = 0.0


def pcb_survey(views: Sequence[View], *, density: float, alpha: float) -> dict[str, Range]:
    """The bounds of every task, over all tensors together."""
    if not views:
        return {}
    ends = order_statistics(views, _clamped_ranks)
    ranges = {task: Range(low, high) for task, (low, high) in ends.items()}
    scores = Population(lambda view: view.tasks, lambda view, base, experts: _scores(view, ranges, experts.sub_(base)))
    cuts = order_statistics(views, lambda _, n: (n - min(int(n * (1 - density)), n - 1), 1), scores)
    return {task: Range(ranges[task].low, ranges[task].high, *cuts[task]) for task in ranges}


def _clamped_ranks(task: str, n: int) -> tuple[int, int]:
    return n - int(n * OUTLIERS), n - max(int(n * (1 - OUTLIERS) - 1), 0)


def pcb(view: View, *, density: float, alpha: float) -> Kernel:
    """Weigh every entry by its magnitude within the task and its agreement across tasks; keep the best.

    arXiv 2410.02396, section 3, as the authors' released code computes it on the whole task vectors: magnitudes are
    clamped at 0.01 % on either side and scaled to 0 .. 1 (``s``); the score is ``exp(T s^2) tanh(tau_t sum_s tau_s)``;
    the top ``density`` of scores, scaled to 0 .. 1, are the weights of a weighted mean of the clamped task vectors.
    Defaults: the code's 10 % and ``lambda = 1``.
    """
    ranges = view.survey if isinstance(view.survey, Mapping) else pcb_survey([view], density=density, alpha=alpha)

    def merge(base: Tensor, experts: Tensor, start: int) -> Tensor:
        taus = experts.sub_(base)
        weights = _scores(view, ranges, taus.clone())
        for tau, weight, task in zip(taus.unbind(0), weights.unbind(0), view.tasks, strict=True):
            bounds: Range = ranges[task]
            spread = bounds.top - bounds.cut
            weight.clamp_(bounds.cut, bounds.top).sub_(bounds.cut).div_(spread if spread > 0 else 1.0)
            sign = tau.sign()
            tau.abs_().clamp_(bounds.low, bounds.high).mul_(sign).mul_(weight)
        return sum_rows(taus).div_(sum_rows(weights).clamp_(min=1e-12)).mul_(alpha).add_(base)

    return Kernel(merge)


def _scores(view: View, ranges: Mapping[str, Range], taus: Tensor) -> Tensor:
    """Scores of ``taus [T, n]``, in their memory, divided by ``exp(T)``, which cancels and would overflow."""
    total = sum_rows(taus)
    for tau, task in zip(taus.unbind(0), view.tasks, strict=True):
        bounds = ranges[task]
        spread = bounds.high - bounds.low
        own = tau.abs().clamp_(bounds.low, bounds.high).sub_(bounds.low).div_(spread if spread > 0 else 1.0)
        tau.mul_(total)
        _apply(np.tanh, torch.tanh, tau)
        tau.mul_(_apply(np.exp, torch.exp, own.square_().sub_(1.0).mul_(float(len(view.tasks)))))
    return taus


def _apply(on_cpu: np.ufunc, elsewhere: object, values: Tensor) -> Tensor:
    """A function of each entry, in place. numpy's results do not depend on an entry's place, torch's tail does."""
    if values.device.type == "cpu":
        on_cpu(values.numpy(), out=values.numpy())
        return values
    return elsewhere(values, out=values)  # type: ignore[operator, no-any-return]
