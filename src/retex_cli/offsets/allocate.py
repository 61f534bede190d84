"""Sharing out a budget of bits over all components of all tensors: greedy on the convex hull of the real quantiser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from retex_cli.offsets.quantiser import DISTORTIONS, RATES

COMPONENT_BITS = 6.0
"""What a kept component costs beside its entries: its level and its scale, entropy coded."""


@dataclass(frozen=True)
class Candidates:
    """Everything of one tensor that could be kept.

    ``energies`` float64 [k]: squared error that dropping each component leaves, descending. ``entries``: how many
    numbers a component consists of. ``factors``: 2 for an outer product of two quantised vectors, 1 for a plain vector.
    """

    energies: NDArray[np.float64]
    entries: int
    factors: int


@cache
def _hull(entries: int, factors: int) -> tuple[tuple[int, float, float], ...]:
    """The levels worth using, as (level, share of the energy kept, bits), on the upper concave hull from (0, 0).

    Two vectors quantised to centroids with relative errors D keep (1 - D)^2 of the energy of their outer product.
    """
    kept = (1 - DISTORTIONS) ** factors
    bits = COMPONENT_BITS + entries * RATES
    hull: list[tuple[int, float, float]] = []
    for level in range(len(RATES)):
        while hull:
            _, kept_before, bits_before = hull[-2] if len(hull) > 1 else (-1, 0.0, 0.0)
            slope_before = (hull[-1][1] - kept_before) / (hull[-1][2] - bits_before)
            if slope_before > (kept[level] - hull[-1][1]) / (bits[level] - hull[-1][2]):
                break
            hull.pop()
        hull.append((level, float(kept[level]), float(bits[level])))
    return tuple(hull)


def minimum_bits(entries: int, factors: int) -> float:
    """Bits of the cheapest useful form of a component with ``entries`` numbers."""
    return _hull(entries, factors)[0][2]


def allocate(candidates: Sequence[Candidates], bits: float) -> list[list[int]]:
    """The level of each kept component, per tensor, leading components first; ``bits`` is the sum they may cost.

    Every step up the hull of a component is an offer of so much energy for so many bits. Offers are taken in order of
    energy per bit; one that no longer fits is passed over, and with it all later steps of that component.
    """
    gains, costs, owners, levels = [], [], [], []
    offset = 0
    for candidate in candidates:
        owner = np.arange(offset, offset + len(candidate.energies))
        offset += len(candidate.energies)
        if not len(owner):
            continue
        kept_before = bits_before = 0.0
        for level, kept, cost in _hull(candidate.entries, candidate.factors):
            gains.append(candidate.energies * (kept - kept_before))
            costs.append(np.full(len(owner), cost - bits_before))
            owners.append(owner)
            levels.append(np.full(len(owner), level))
            kept_before, bits_before = kept, cost
    chosen = np.full(offset, -1)
    if gains:
        _take(
            np.concatenate(gains), np.concatenate(costs), np.concatenate(owners), np.concatenate(levels), bits, chosen
        )
    starts = np.cumsum([0] + [len(candidate.energies) for candidate in candidates])
    return [_leading(chosen[a:b]) for a, b in pairwise(starts)]


def _take(
    gains: NDArray[np.float64],
    costs: NDArray[np.float64],
    owners: NDArray[np.int64],
    levels: NDArray[np.int64],
    bits: float,
    chosen: NDArray[np.int64],
) -> None:
    order = np.lexsort((levels, -gains / costs))  # equal slopes: lower levels first, so the result is one
    order = order[gains[order] > 0]
    cumulative = np.cumsum(costs[order])
    prefix = int(np.searchsorted(cumulative, bits, side="right"))
    np.maximum.at(chosen, owners[order[:prefix]], levels[order[:prefix]])
    left = bits - (float(cumulative[prefix - 1]) if prefix else 0.0)
    passed: set[int] = set()
    rest = order[prefix:]
    cheapest = float(costs[rest].min()) if len(rest) else 0.0
    for index in rest:
        if left < cheapest:
            break
        owner = int(owners[index])
        if owner in passed:
            continue
        if costs[index] > left:
            passed.add(owner)
            continue
        left -= float(costs[index])
        chosen[owner] = levels[index]


def _leading(levels: NDArray[np.int64]) -> list[int]:
    """Levels of the kept components; energies descend, so they are the leading ones."""
    kept = int((levels >= 0).sum())
    return [int(level) for level in np.sort(levels)[::-1][:kept]]
