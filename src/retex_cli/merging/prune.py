"""Merges that prune each task vector by the rank of its entries: Breadcrumbs and DELLA."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from retex_cli.merging.linear import sum_rows, sum_scale, weigh_
from retex_cli.merging.masks import drop_each_, keys
from retex_cli.merging.options import Number, each
from retex_cli.merging.selection import keep_count, order_statistics, shrink_bound
from retex_cli.merging.sparse import disjoint_mean_, rescaled, trim_
from retex_cli.merging.view import Kernel, View


def breadcrumbs(
    view: View,
    *,
    density: Number,
    gamma: Number,
    alpha: float,
    weight: Number,
    elect: bool,
    normalise: bool,
    cancelled: str,
) -> Kernel:
    """Drop the smallest entries of each task vector and its few largest, then task arithmetic.

    arXiv 2312.06795, section 3, per tensor: the share ``gamma`` of largest magnitudes (outliers) is dropped, the next
    ``density`` is kept, ``theta = theta_0 + alpha sum_t m_t tau_t``. The defaults are where the authors' search starts:
    15 %, 0.6 % and ``alpha = 0.2``. (Their code takes the shares of each row; the paper's, of each layer.)
    ``elect``: the election of TIES in place of the plain sum, as in mergekit's ``breadcrumbs_ties``.
    """
    kept = dict(zip(view.tasks, each(density, view.tasks), strict=True))
    dropped = dict(zip(view.tasks, each(gamma, view.tasks), strict=True))

    def ranks(task: str, n: int) -> Sequence[int]:
        keep = keep_count(n, kept[task])
        outliers = min(int(dropped[task] * n), n - keep)
        return outliers, outliers + keep

    found = order_statistics([view], ranks)
    lows = [shrink_bound(found[task][1]) for task in view.tasks]
    highs = [found[task][0] for task in view.tasks]
    fuse = fusion(alpha, each(weight, view.tasks), elect, normalise, cancelled)

    def merge(base: Tensor, experts: Tensor, start: int) -> Tensor:
        taus = trim_(experts.sub_(base), lows)
        for tau, high in zip(taus.unbind(0), highs, strict=True):
            tau.sub_(torch.hardshrink(tau, shrink_bound(high)))  # what is left of x - x is an exact 0
        return fuse(taus).add_(base)

    return Kernel(merge)


def fusion(
    alpha: float, weights: Sequence[float], elect: bool, normalise: bool, cancelled: str
) -> Callable[[Tensor], Tensor]:
    """From pruned ``taus [T, n]`` to the merged task vector ``[n]``: the election and mean of TIES, or a plain sum."""
    if elect:
        return lambda taus: disjoint_mean_(taus, weights, normalise=normalise, cancelled=cancelled).mul_(alpha)
    scale = sum_scale(alpha, weights, normalise)
    return lambda taus: sum_rows(weigh_(taus, weights)).mul_(scale)


def della(
    view: View,
    *,
    density: Number,
    window: Number,
    alpha: float,
    weight: Number,
    elect: bool,
    normalise: bool,
    cancelled: str,
    rescale: str,
) -> Kernel:
    """Drop entries at random, small ones more often, rescale, elect signs, average what agrees.

    arXiv 2406.11617, section 3 (MagPrune, Elect, Fuse). In each row of a matrix the entry of rank r of n (0 is the
    smallest magnitude) is kept with probability ``density + window (r / (n - 1) - 1/2)`` and divided by it, as in the
    authors' code, which also gives the defaults: drop rate 0.3, window 0.14, lambda 1.1. ``elect = False`` sums what
    is left, as mergekit's ``della_linear``.
    """
    row = max(view.row, 1)
    prune = _mag_prune(view, row, each(density, view.tasks), each(window, view.tasks), divide=rescale == "share")
    if rescale == "l1":
        prune = rescaled(view, prune, row)
    fuse = fusion(alpha, each(weight, view.tasks), elect, normalise, cancelled)

    def merge(base: Tensor, experts: Tensor, start: int) -> Tensor:
        return fuse(prune(experts.sub_(base), start)).add_(base)

    return Kernel(merge, unit=row)


def _mag_prune(
    view: View, row: int, densities: Sequence[float], windows: Sequence[float], *, divide: bool
) -> Callable[[Tensor, int], Tensor]:
    """MagPrune of whole rows of ``taus [T, n]``, in place; ``divide`` by the chance to be kept."""
    key = keys(view.seed, view.name, view.tasks)

    def prune(taus: Tensor, start: int) -> Tensor:
        keep = (magnitude_ranks(taus.view(-1, row)).div_(max(row - 1, 1)) if row > 1 else _middle(taus)).view_as(taus)
        for chance, density, window in zip(keep.unbind(0), densities, windows, strict=True):
            chance.sub_(0.5).mul_(window).add_(density).clamp_(1e-6, 1.0)
        drop_each_(taus, keep, key, start)
        return taus.div_(keep) if divide else taus

    return prune


def _middle(taus: Tensor) -> Tensor:
    return torch.full_like(taus, 0.5)


def magnitude_ranks(rows: Tensor) -> Tensor:
    """Rank of each entry's magnitude within its row of ``rows [m, n]``, 0 the smallest, as float32; ties by column.

    Magnitude and column are packed into one integer: a plain sort of numbers, whose result is unique.
    """
    count = rows.shape[1]
    columns = torch.arange(count, device=rows.device)
    packed = rows.abs().view(torch.int32).to(torch.int64).bitwise_left_shift_(32).add_(columns)
    order = _sorted(packed).bitwise_and_(0xFFFFFFFF)
    ranks = torch.empty_like(rows)
    return ranks.scatter_(1, order, columns.to(rows.dtype).expand_as(ranks))


def _sorted(packed: Tensor) -> Tensor:
    if packed.device.type != "cpu":
        return packed.sort(dim=1).values
    packed.numpy().sort(axis=1)  # vectorised, in place; torch's takes indices along
    return packed
