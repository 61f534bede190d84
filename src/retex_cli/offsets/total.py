"""The budget at which coded offsets and the exact correction over them are smallest together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from retex_cli.offsets.allocate import Candidates, allocate

STEPS = 14
"""Budgets that are tried, each the previous one over the square root of two."""


@dataclass(frozen=True)
class Noise:
    """What a correction of one tensor has to describe: ``entries`` that differ from the merged ones, to a precision of
    ``step`` (distance of neighbouring values, as of a typical entry)."""

    entries: int
    step: float


def cheapest_total(candidates: Sequence[Candidates], noises: Sequence[Noise], most: int) -> int:
    """The budget in bytes, at most ``most``, at which the expected total is smallest.

    Errors count as normal: half a bit for each halving of a tensor's squared error, until it falls below the step.
    """
    budgets = [most * math.pow(2, -k / 2) for k in range(STEPS)]
    totals = [_expected_bits(candidates, noises, 8 * budget) for budget in budgets]
    return max(1, int(budgets[totals.index(min(totals))]))


def _expected_bits(candidates: Sequence[Candidates], noises: Sequence[Noise], bits: float) -> float:
    total = 0.0
    for candidate, noise, levels in zip(candidates, noises, allocate(candidates, bits), strict=True):
        if not noise.entries or not len(candidate.energies):
            continue
        left = candidate.energies.copy()
        left[: len(levels)] *= 1 - candidate.kept[np.array(levels, dtype=np.int64)]
        variance = (max(float(left.sum()), 0.0) + candidate.rest) / noise.entries / noise.step**2 + 1 / 12
        total += float(candidate.bits[levels].sum()) + noise.entries / 2 * math.log2(2 * math.pi * math.e * variance)
    return total
