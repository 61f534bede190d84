"""Merges that drop most entries of each task vector: TIES and DARE."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from retex_cli.merging.linear import sum_rows, sum_scale, weigh_
from retex_cli.merging.masks import drop_, keys
from retex_cli.merging.options import Number, Value, each
from retex_cli.merging.selection import shrink_bound, top_magnitudes
from retex_cli.merging.view import Kernel, View


def trim_(taus: Tensor, bounds: Sequence[float]) -> Tensor:
    """Zero the entries of ``taus [T, n]`` whose magnitude does not exceed their task's bound."""
    for row, bound in zip(taus.unbind(0), bounds, strict=True):
        torch.hardshrink(row, bound, out=row)
    return taus


def elected_(taus: Tensor, cancelled: str = "zero") -> Tensor:
    """Elect a sign per entry by total mass, returned ``[n]``; what has it stays in ``taus [T, n]``, as magnitudes.

    Entries whose mass cancels exactly have no sign and give 0, as the formula of TIES says; ``cancelled="plus"`` takes
    them for positive, as mergekit and peft do.
    """
    sign = sum_rows(taus).sign_()
    if cancelled == "plus":
        sign.masked_fill_(sign.eq(0), 1)
    taus.mul_(sign).clamp_(min=0)
    return sign


def disjoint_mean_(
    taus: Tensor, weights: Sequence[float], *, normalise: bool = True, cancelled: str = "zero"
) -> Tensor:
    """Elect a sign per entry by total mass, then average the non-zero entries of ``taus [T, n]`` that have it.

    Steps 2 and 3 of TIES on weighted task vectors ``w_t tau_t``: the sum of what agrees over the sum of the weights
    that agree, or the sum alone if not ``normalise``. Overwrites ``taus``; returns ``[n]``.
    """
    sign = elected_(weigh_(taus, weights), cancelled)
    if not normalise:
        return sum_rows(taus).mul_(sign)
    total = sum_rows(taus)
    below = sum_rows(weigh_(taus.sign_(), weights))
    if min(weights) > 0:
        below.clamp_(min=min(weights))  # where nothing agrees
    else:
        below.masked_fill_(below.eq(0), 1)
    return total.div_(below).mul_(sign)


def ties_survey(views: Sequence[View], *, density: Number, scope: str, **others: Value) -> dict[str, float] | None:
    """The thresholds of ``scope="global"``: the top-k is taken over all tensors of a task vector together."""
    return top_magnitudes(views, density) if scope == "global" and views else None


def ties(
    view: View, *, density: Number, alpha: float, scope: str, weight: Number, normalise: bool, cancelled: str
) -> Kernel:
    """Trim each task vector to its largest entries, elect signs, average what agrees.

    arXiv 2306.01708, algorithm 1, with its defaults for use without validation data: the top 20 % are kept and
    ``alpha = 1``. The paper trims over the whole task vector (``scope="global"``); ``"tensor"`` trims each tensor.
    Weights are not in the paper: they multiply the trimmed task vectors, before the election.
    """
    thresholds = view.survey if isinstance(view.survey, dict) else top_magnitudes([view], density)
    bounds, weights = [shrink_bound(thresholds[task]) for task in view.tasks], each(weight, view.tasks)

    def merge(base: Tensor, experts: Tensor, start: int) -> Tensor:
        taus = trim_(experts.sub_(base), bounds)
        return disjoint_mean_(taus, weights, normalise=normalise, cancelled=cancelled).mul_(alpha).add_(base)

    return Kernel(merge)


Prune = Callable[[Tensor, int], Tensor]
"""Zeroes entries of ``taus [T, n]`` (elements from the second argument on), in place."""


def rescaled(view: View, prune: Prune, unit: int = 1) -> Prune:
    """``prune``, then each task vector scaled to the L1 norm that it had before; it takes a pass over the tensor.

    What mergekit does in place of dividing by the chance to be kept: the same in expectation where that is the same
    for all entries. Nearly empty task vectors are left as they are.
    """
    before = after = torch.zeros(len(view.tasks), dtype=torch.float64)
    for start, base, experts in view.blocks(unit=unit):
        taus = experts.to(view.device).sub_(base.to(view.device))
        before = before + taus.abs().sum(1, dtype=torch.float64).cpu()
        after = after + prune(taus, start).abs().sum(1, dtype=torch.float64).cpu()
    pairs = zip(before.tolist(), after.tolist(), strict=True)
    ratios = [b / a if min(a, b) >= 1e-7 else 1.0 for b, a in pairs]
    return lambda taus, start: weigh_(prune(taus, start), ratios)


def _drop_and_rescale(view: View, density: Number, rescale: str) -> Prune:
    """DARE, arXiv 2311.03099, equation 2: keep each entry with probability ``density``, divide it by ``density``."""
    key, shares = keys(view.seed, view.name, view.tasks), each(density, view.tasks)
    below = torch.tensor(shares, device=view.device)[:, None]

    def drop(taus: Tensor, start: int) -> Tensor:
        return drop_(taus, shares, key, start)

    def divide(taus: Tensor, start: int) -> Tensor:
        return drop(taus, start).div_(below)

    if rescale == "l1":
        return rescaled(view, drop)
    return divide if rescale == "share" else drop


def dare(view: View, *, density: Number, alpha: float, weight: Number, normalise: bool, rescale: str) -> Kernel:
    """Drop entries of each task vector at random, rescale the rest, then task arithmetic.

    arXiv 2311.03099. The paper drops 90 % without loss (``density = 0.1``); ``alpha`` as in task arithmetic.
    """
    dropped, weights = _drop_and_rescale(view, density, rescale), each(weight, view.tasks)
    scale = sum_scale(alpha, weights, normalise)

    def merge(base: Tensor, experts: Tensor, start: int) -> Tensor:
        return sum_rows(weigh_(dropped(experts.sub_(base), start), weights)).mul_(scale).add_(base)

    return Kernel(merge)


def dare_ties(
    view: View,
    *,
    density: Number,
    alpha: float,
    weight: Number,
    normalise: bool,
    cancelled: str,
    rescale: str,
) -> Kernel:
    """Drop and rescale as DARE does, then elect signs and average what agrees, as TIES does.

    arXiv 2311.03099, section 4.3. The random drop stands in for the trim: at the paper's drop rate of 90 % a trim to
    the top 20 % keeps every entry that is left.
    """
    dropped, weights = _drop_and_rescale(view, density, rescale), each(weight, view.tasks)

    def merge(base: Tensor, experts: Tensor, start: int) -> Tensor:
        taus = dropped(experts.sub_(base), start)
        return disjoint_mean_(taus, weights, normalise=normalise, cancelled=cancelled).mul_(alpha).add_(base)

    return Kernel(merge)
