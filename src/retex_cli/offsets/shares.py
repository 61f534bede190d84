"""One budget for several tasks, and the smallest budget that is good enough for one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from retex_cli.offsets.allocate import Candidates, allocate

FINEST = 1.05
"""The smallest budget is sought until it is known within this factor."""
STEP = 2.0
"""Budgets that are tried first, each so many times the one before."""


def share_out(tasks: Sequence[Sequence[Candidates]], least: Sequence[int], budget: int) -> list[int]:
    """Bytes for each task that sum to at most ``budget``, by one allocation over all tensors of all of them.

    Every component of every task costs the same energy a bit at the margin (one Lagrange multiplier), so a task gets
    what its offsets need beside the others'. ``least`` bytes go to each in any case. ValueError where they exceed the
    budget.
    """
    if sum(least) > budget:
        raise ValueError(f"{sum(least)} bytes are the least for all tasks, more than {budget}")
    levels = iter(allocate([candidates for task in tasks for candidates in task], 8.0 * budget))
    bits = [sum(float(candidates.bits[next(levels)].sum()) for candidates in task) for task in tasks]
    return _in_proportion(bits, least, budget)


def share_again(shares: Sequence[int], distances: Sequence[float], least: Sequence[int], budget: int) -> list[int]:
    """Bytes for each task, from how far answers are from the experts' (a divergence, say) with ``shares``.

    Distances are taken to fall in inverse proportion to bytes; these shares make the sum of their squares the least, so
    tasks that are far off count most. None falls below a quarter of what it had, as no distance is exact, nor below
    ``least``. Where nothing is far off, or a distance is no number, ``shares`` stay.
    """
    if not any(distances) or not all(map(math.isfinite, distances)):
        return list(shares)
    parts = [(share * distance) ** (2 / 3) for share, distance in zip(shares, distances, strict=True)]
    return _in_proportion(parts, [max(low, share // 4) for low, share in zip(least, shares, strict=True)], budget)


def _in_proportion(parts: Sequence[float], least: Sequence[int], budget: int) -> list[int]:
    total = sum(parts) or 1.0
    shares = [math.floor(budget * part / total) for part in parts]
    raised = [max(share, low) for share, low in zip(shares, least, strict=True)]
    over = sum(raised) - budget
    spare = sum(share - low for share, low in zip(raised, least, strict=True))
    if over <= 0:
        return raised
    return [share - math.ceil(over * (share - low) / spare) for share, low in zip(raised, least, strict=True)]


@dataclass(frozen=True)
class Found:
    """Coded offsets, the budget they were fitted to and what they score."""

    data: bytes
    budget: int
    score: float


def smallest(
    code: Callable[[int], bytes], score: Callable[[bytes], float], target: float, least: int, most: int
) -> Found:
    """The smallest of the tried budgets between ``least`` and ``most`` bytes whose coded offsets score ``target``.

    Budgets are doubled until one is enough, then halved on a logarithmic scale between it and the last that was not.
    What is found for ``most`` is returned where nothing is enough: the caller looks at its score.
    """

    def tried(budget: int) -> Found:
        data = code(budget)
        return Found(data, budget, score(data))

    low, found = 0, tried(min(least, most))
    while found.score < target and found.budget < most:
        low = found.budget
        found = tried(min(math.ceil(STEP * low), most))
    while found.score >= target and low and found.budget > FINEST * low:
        middle = tried(round(math.sqrt(low * found.budget)))
        if middle.score >= target:
            found = middle
        else:
            low = middle.budget
    return found
