"""Sharing out a budget of bits over all components of all tensors: greedy on the convex hull of the real quantiser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Candidates:
    """Everything of one tensor that could be kept.

    ``energies`` float64 [k]: squared error that dropping each component leaves, descending. ``kept`` and ``bits``
    float64 [levels]: the share of its energy that a component keeps at each level, and what it costs. ``rest``: squared
    error outside of all of them, where no further components were looked for.
    """

    energies: Floats
    kept: Floats
    bits: Floats
    rest: float = 0.0

    @property
    def hull(self) -> list[int]:
        """The levels worth using: those on the upper concave hull of (bits, kept) from (0, 0)."""
        hull: list[int] = []
        for level in range(len(self.bits)):
            while hull and self._slope(hull[-1], level) >= self._slope(hull[-2] if len(hull) > 1 else -1, hull[-1]):
                hull.pop()
            if self._slope(hull[-1] if hull else -1, level) > 0:
                hull.append(level)
        return hull

    def _slope(self, low: int, high: int) -> float:
        """Energy gained per bit from one level to another; -1 is dropping the component."""
        kept, bits = (self.kept[low], self.bits[low]) if low >= 0 else (0.0, 0.0)
        return float((self.kept[high] - kept) / (self.bits[high] - bits))


def allocate(candidates: Sequence[Candidates], bits: float) -> list[list[int]]:
    """The level of each kept component, per tensor, leading components first; ``bits`` is the sum they may cost.

    Every step up the hull of a component is an offer of so much energy for so many bits. Offers are taken in order of
    energy per bit; one that no longer fits is passed over, and with it all later steps of that component.
    """
    gains, costs, owners, levels = [], [], [], []
    offset = 0
    for candidate in candidates:
        owner = np.arange(offset, offset + len(candidate.energies))
        offset += len(owner)
        if not len(owner):
            continue
        kept_before = bits_before = 0.0
        for level in candidate.hull:
            gains.append(candidate.energies * (candidate.kept[level] - kept_before))
            costs.append(np.full(len(owner), candidate.bits[level] - bits_before))
            owners.append(owner)
            levels.append(np.full(len(owner), level))
            kept_before, bits_before = float(candidate.kept[level]), float(candidate.bits[level])
    chosen = np.full(offset, -1)
    if gains:
        _take(
            np.concatenate(gains), np.concatenate(costs), np.concatenate(owners), np.concatenate(levels), bits, chosen
        )
    starts = np.cumsum([0] + [len(candidate.energies) for candidate in candidates])
    return [_leading(chosen[a:b]) for a, b in pairwise(starts)]


def _take(
    gains: Floats,
    costs: Floats,
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
