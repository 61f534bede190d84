"""The exact k-th largest magnitude of task vectors, streamed: nothing is held but what lies near the answer.

A sample brackets the answer; one pass counts what lies above the bracket and collects what lies in it; a partition of
the collected values gives the answer, which the counts prove. Should the bracket have missed, two passes of counting by
bit pattern find it. Either way the result is the true order statistic, whatever the sample, blocks or threads were.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from retex_cli.merging.view import View, spans

Floats = NDArray[np.float32]

COLLECT_ALL = 1 << 18
"""Up to this many elements, all are collected: a sample would cost more."""
COLLECT_MOST = 1 << 24
"""Values held at most (64 MB); past it, count bit patterns."""
SPAN = 1 << 22
"""Elements that one thread passes over in one go."""


def keep_count(elements: int, density: float) -> int:
    """How many entries a density keeps: ``int(density * elements)``, but at least one of a tensor that has any."""
    return min(elements, max(1, int(density * elements)))


def top_magnitudes(views: Sequence[View], density: float) -> dict[str, float]:
    """Per task, the k-th largest ``|tau|`` over all ``views`` together, ``k = keep_count(elements, density)``.

    Entries with ``|tau| >= threshold`` are the top k (and those equal to the k-th).
    """
    elements: dict[str, int] = {}
    for view in views:
        for task in view.tasks:
            elements[task] = elements.get(task, 0) + view.numel
    wanted = {task: keep_count(n, density) for task, n in elements.items() if n}
    found = {task: 0.0 for task, k in wanted.items() if k == elements[task]}
    found.update({task: math.inf for task, n in elements.items() if n == 0})
    wanted = {task: k for task, k in wanted.items() if task not in found}
    if not wanted:
        return found
    brackets = _brackets(views, elements, wanted)
    room = _Room(COLLECT_MOST)
    tallies = {task: _Tally(*brackets[task], room) for task in wanted}
    _visit(views, tallies, lambda task: _Tally(*brackets[task], room))
    for task, k in wanted.items():
        answer = tallies[task].answer(k)
        found[task] = _by_bits(views, task, k) if answer is None else answer
    return found


class _Room:
    """A count shared by threads: how many values may still be collected."""

    def __init__(self, size: int) -> None:
        self.left = size
        self.lock = threading.Lock()

    def take(self, size: int) -> bool:
        with self.lock:
            self.left -= size
            return self.left >= 0


class _Tally:
    """Counts of one task's magnitudes above a bracket ``(low, high]``, and the values inside it."""

    def __init__(self, low: float, high: float, room: _Room) -> None:
        self.low, self.high, self.room = np.float32(low), np.float32(high), room
        self.above = self.positive = 0
        self.inside: list[Floats] = []
        self.full = False

    def add(self, values: Floats) -> None:
        """Take in more magnitudes ``[n]``."""
        if self.full:
            return
        inside = values > self.low
        if self.low == 0:
            self.positive += int(np.count_nonzero(inside))
        if self.high < np.inf:
            above = values > self.high
            self.above += int(np.count_nonzero(above))
            inside ^= above
        kept = values[inside]
        self.full = not self.room.take(kept.size)
        if kept.size and not self.full:
            self.inside.append(kept)

    def merge(self, other: _Tally) -> None:
        """Take in what another thread counted."""
        self.above += other.above
        self.positive += other.positive
        self.inside += other.inside
        self.full |= other.full

    def answer(self, k: int) -> float | None:
        """The k-th largest, if these counts prove it."""
        if self.full:
            return None
        values = np.concatenate(self.inside) if self.inside else np.empty(0, np.float32)
        self.inside = []
        if self.above < k <= self.above + values.size:
            place = values.size - (k - self.above)
            values.partition(place)
            return float(values[place])
        return 0.0 if self.low == 0 and k > self.positive else None


class _Histogram:
    """Counts of one task's magnitudes by 16 bits of their pattern: the upper ones, or the lower for a given upper."""

    def __init__(self, upper: int | None = None) -> None:
        self.upper = upper
        self.counts = np.zeros(1 << 16, np.int64)

    def add(self, values: Floats) -> None:
        """Take in more magnitudes ``[n]``. Patterns of non-negative floats are ordered as the floats are."""
        bits = values.view(np.uint32)
        chosen = bits >> 16 if self.upper is None else bits[(bits >> 16) == self.upper] & 0xFFFF
        self.counts += np.bincount(chosen, minlength=1 << 16)

    def merge(self, other: _Histogram) -> None:
        """Take in what another thread counted."""
        self.counts += other.counts

    def rank(self, k: int) -> tuple[int, int]:
        """The bin of the k-th largest, and its rank among that bin's."""
        cumulative = np.cumsum(self.counts[::-1])
        place = int(np.searchsorted(cumulative, k))
        before = int(cumulative[place - 1]) if place else 0
        return (1 << 16) - 1 - place, k - before


def _by_bits(views: Sequence[View], task: str, k: int) -> float:
    """The k-th largest by two counting passes: always right, never large, slower."""
    first = {task: _Histogram()}
    _visit(views, first, lambda _: _Histogram())
    upper, rank = first[task].rank(k)
    second = {task: _Histogram(upper)}
    _visit(views, second, lambda _: _Histogram(upper))
    lower, _ = second[task].rank(rank)
    return float(np.uint32(upper << 16 | lower).view(np.float32))


C = TypeVar("C", _Tally, _Histogram)


def _visit(views: Sequence[View], totals: dict[str, C], new: Callable[[str], C]) -> None:
    """Pass over all ``views`` once and add every magnitude of each task in ``totals`` to its counter."""

    def visit(pieces: list[tuple[View, int, int]]) -> dict[str, C]:
        counters = {task: new(task) for task in totals}
        for view, first, stop in pieces:
            for _, base, experts in view.blocks(first=first, stop=stop):
                magnitudes = experts.sub_(base).abs_().numpy()
                for task, values in zip(view.tasks, magnitudes, strict=True):
                    if task in counters:
                        counters[task].add(values)
        return counters

    for part in views[0].map(visit, spans(views, SPAN)):
        for task, counter in part.items():
            totals[task].merge(counter)


def _brackets(
    views: Sequence[View], elements: dict[str, int], wanted: dict[str, int]
) -> dict[str, tuple[float, float]]:
    """Per task an interval ``(low, high]`` that very probably holds the k-th largest magnitude and little else."""
    total = sum(view.numel for view in views)
    if total <= COLLECT_ALL:
        return dict.fromkeys(wanted, (-1.0, math.inf))
    samples: dict[str, list[Floats]] = {task: [] for task in wanted}
    for view, start, length in _sample_places(views, total):
        base, experts = view.load(start, length)
        for task, values in zip(view.tasks, experts.sub_(base).abs_().numpy().copy(), strict=True):
            if task in samples:
                samples[task].append(values)
    return {task: bracket(samples[task], k / elements[task]) for task, k in wanted.items()}


def _sample_places(views: Sequence[View], total: int) -> list[tuple[View, int, int]]:
    """Short runs spread evenly over all elements, with a shift that no row length divides."""
    runs, length = (64, 256) if total <= 1 << 23 else (1024, 64)
    ends = list(accumulate(view.numel for view in views))
    places = []
    for i in range(runs):
        at = int((i + i * 0.6180339887 % 1) * total / runs)
        index = bisect_right(ends, at)
        view = views[index]
        start = min(at - (ends[index] - view.numel), max(0, view.numel - length))
        places.append((view, start, min(length, view.numel)))
    return places


def bracket(runs: Sequence[Floats], share: float) -> tuple[float, float]:
    """Bounds of the value that a ``share`` of all elements exceeds, five standard errors wide to each side.

    The error is estimated from differences between neighbouring runs, so rows that differ widen it.
    """
    if not runs:
        return -1.0, math.inf
    values = np.sort(np.concatenate(runs))[::-1]
    middle = values[min(values.size - 1, int(share * values.size))]
    shares = np.array([np.mean(run >= middle) for run in runs])
    error = math.sqrt(float(np.sum(np.diff(shares) ** 2)) / (2 * max(1, shares.size - 1) * shares.size))
    margin = 5 * error + 8 / values.size
    top, bottom = int((share - margin) * values.size), int((share + margin) * values.size) + 1
    high = float(values[top]) if share > margin else math.inf
    low = float(values[bottom]) if bottom < values.size else -1.0
    return (low, high) if low < high else (float(np.nextafter(np.float32(low), np.float32(-1))), high)


def shrink_bound(threshold: float) -> float:
    """The largest float32 below ``threshold``: ``|x| >= threshold`` is ``|x| >`` this, what ``hardshrink`` keeps.

    Below zero for a threshold of zero, so that every entry is kept.
    """
    return float(torch.nextafter(torch.tensor(threshold), torch.tensor(-math.inf)).item())
