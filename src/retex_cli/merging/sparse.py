"""Merges that drop most entries of each task vector: TIES and DARE."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from retex_cli.merging.linear import sum_rows
from retex_cli.merging.masks import drop_, keys
from retex_cli.merging.selection import shrink_bound, top_magnitudes
from retex_cli.merging.view import Kernel, View


def trim_(taus: Tensor, bounds: Sequence[float]) -> Tensor:
    """Zero the entries of ``taus [T, n]`` whose magnitude does not exceed their task's bound."""
    for row, bound in zip(taus.unbind(0), bounds, strict=True):
        torch.hardshrink(row, bound, out=row)
    return taus


def disjoint_mean_(taus: Tensor) -> Tensor:
    """Elect a sign per entry by total mass, then average the non-zero entries of ``taus [T, n]`` that have it.

    Steps 2 and 3 of TIES. Entries whose mass cancels exactly have no sign and give 0, as the paper's formula says.
    Overwrites ``taus``; returns ``[n]``.
    """
    sign = sum_rows_copy(taus).sign_()
    taus.mul_(sign).clamp_(min=0)  # what agrees with the elected sign, as magnitudes
    total = sum_rows_copy(taus)
    count = sum_rows(taus.sign_()).clamp_(min=1)
    return total.div_(count).mul_(sign)


def sum_rows_copy(rows: Tensor) -> Tensor:
    """Sum of ``rows [T, n]`` over T, in order, leaving them as they are."""
    first, *others = rows.unbind(0)
    total = torch.add(first, others[0]) if others else first.clone()
    for row in others[1:]:
        total.add_(row)
    return total


def ties_survey(views: Sequence[View], *, density: float, alpha: float, scope: str) -> dict[str, float] | None:
    """The thresholds of ``scope="global"``: the top-k is taken over all tensors of a task vector together."""
    return top_magnitudes(views, density) if scope == "global" and views else None


def ties(view: View, *, density: float, alpha: float, scope: str) -> Kernel:
    """Trim each task vector to its largest entries, elect signs, average what agrees.

    arXiv 2306.01708, algorithm 1, with its defaults for use without validation data: the top 20 % are kept and
    ``alpha = 1``. The paper trims over the whole task vector (``scope="global"``); ``"tensor"`` trims each tensor.
    """
    thresholds = view.survey if isinstance(view.survey, dict) else top_magnitudes([view], density)
    bounds = [shrink_bound(thresholds[task]) for task in view.tasks]

    def merge(base: Tensor, experts: Tensor, start: int) -> Tensor:
        return disjoint_mean_(trim_(experts.sub_(base), bounds)).mul_(alpha).add_(base)

    return Kernel(merge)


def _drop_and_rescale(view: View, density: float) -> Callable[[Tensor, int], Tensor]:
    """DARE, arXiv 2311.03099, equation 2: keep each entry with probability ``density``, divide it by ``density``."""
    key = keys(view.seed, view.name, view.tasks).to(view.device)
    return lambda taus, start: drop_(taus, density, key, start).div_(density)


def dare(view: View, *, density: float, alpha: float) -> Kernel:
    """Drop entries of each task vector at random, rescale the rest, then task arithmetic.

    arXiv 2311.03099. The paper drops 90 % without loss (``density = 0.1``); ``alpha`` as in task arithmetic.
    """
    dropped = _drop_and_rescale(view, density)

    def merge(base: Tensor, experts: Tensor, start: int) -> Tensor:
        return sum_rows(dropped(experts.sub_(base), start)).mul_(alpha).add_(base)

    return Kernel(merge)


def dare_ties(view: View, *, density: float, alpha: float) -> Kernel:
    """Drop and rescale as DARE does, then elect signs and average what agrees, as TIES does.

    arXiv 2311.03099, section 4.3. The random drop stands in for the trim: at the paper's drop rate of 90 % a trim to
    the top 20 % keeps every entry that is left.
    """
    dropped = _drop_and_rescale(view, density)

    def merge(base: Tensor, experts: Tensor, start: int) -> Tensor:
        return disjoint_mean_(dropped(experts.sub_(base), start)).mul_(alpha).add_(base)

    return Kernel(merge)
