"""Exact order statistics of task vectors, streamed: nothing is held but what lies near the answer.

A sample brackets the answer; one pass counts what lies above the bracket and collects what lies in it; a partition of
the collected values gives the answer, which the counts prove. Should the bracket have missed, two passes of counting by
bit pattern find it. Either way the result is the true order statistic, whatever the sample, blocks or threads were.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retex_cli.merging.options import Number, each
from retex_cli.merging.view import View, spans

Floats = NDArray[np.float32]
Key = tuple[str, int]

COLLECT_ALL = 1 << 18
"""Up to this many elements, all are collected: a sample would cost more."""
KEPT_AT_ONCE = 1 << 15
"""Values that a buffer of collected ones holds."""
SPAN = 1 << 22
"""Elements that one thread passes over in one go."""
TIED = 0.002
"""Share of a sample from which on a bound is counted as a value of its own: weights of few bits repeat theirs."""


@dataclass(frozen=True)
class Population:
    """Whose order statistics are asked for: ``rows(view)`` names, ``score(view, base, experts)`` gives their values.

    Scores are float32 ``[rows, n]`` for blocks ``base [n]``, ``experts [T, n]``, which they may overwrite; they depend
    on the element alone, not on the block.
    """

    rows: Callable[[View], tuple[str, ...]]
    score: Callable[[View, Tensor, Tensor], Tensor]


MAGNITUDES = Population(lambda view: view.tasks, lambda view, base, experts: experts.sub_(base).abs_())
"""Per task, the magnitudes of its task vector."""


def keep_count(elements: int, density: float) -> int:
    """How many entries a density keeps: ``int(density * elements)``, but at least one of a tensor that has any."""
    return min(elements, max(1, int(density * elements)))


def top_magnitudes(views: Sequence[View], density: Number) -> dict[str, float]:
    """Per task, the k-th largest ``|tau|`` over all ``views`` together, ``k = keep_count(elements, density)``.

    Entries with ``|tau| >= threshold`` are the top k (and those equal to the k-th); 0 where all are kept.
    """
    densities = {task: each(density, (task,))[0] for view in views for task in view.tasks}
    if min(densities.values()) >= 1:
        return dict.fromkeys(densities, 0.0)
    found = order_statistics(views, lambda task, n: (keep_count(n, densities[task]),))
    return {task: values[0] for task, values in found.items()}


def order_statistics(
    views: Sequence[View], ranks: Callable[[str, int], Sequence[int]], population: Population = MAGNITUDES
) -> dict[str, tuple[float, ...]]:
    """Per row of the population, over all ``views`` together, the values of the given ranks (1 is the largest).

    ``ranks(row, n)`` says which, for a row of n elements; rank 0 gives infinity, as does any rank of an empty row.
    """
    elements: dict[str, int] = {}
    for view in views:
        for row in population.rows(view):
            elements[row] = elements.get(row, 0) + view.numel
    asked = {row: tuple(ranks(row, n)) if n else () for row, n in elements.items()}
    wanted = {(row, i): k for row, each in asked.items() for i, k in enumerate(each) if k}
    found: dict[Key, float] = {}
    if wanted:
        shares = {key: k / elements[key[0]] for key, k in wanted.items()}
        brackets, room = _brackets(views, population, shares), _Room(views[0].room)
        tallies = _visit(views, population, {key: _TallyMaker(bounds, room) for key, bounds in brackets.items()})
        answers = {key: tallies.pop(key).answer(k) for key, k in wanted.items()}
        missed = {key: wanted[key] for key, answer in answers.items() if answer is None}
        found = {key: answer for key, answer in answers.items() if answer is not None}
        found |= _by_bits(views, population, missed) if missed else {}
    return {
        row: tuple(found.get((row, i), math.inf) for i in range(len(asked[row] or ranks(row, 1)))) for row in elements
    }


class _Room:
    """A count shared by threads: how many values may still be collected."""

    def __init__(self, size: int) -> None:
        self.left = size
        self.lock = threading.Lock()

    def take(self, size: int) -> bool:
        with self.lock:
            self.left -= size
            return self.left >= 0


class _Counter(ABC):
    """Takes in values block by block; parts counted by several threads are merged."""

    @abstractmethod
    def add(self, values: Floats) -> None:
        """Take in more values ``[n]``."""


@dataclass(frozen=True)
class Bounds:
    """An interval ``(low, high]`` that probably holds the answer; ``tied``: ``low`` itself may be the answer."""

    low: float = -math.inf
    high: float = math.inf
    tied: bool = False


class _Tally(_Counter):
    """Counts of values above an interval, and the values inside it."""

    def __init__(self, bounds: Bounds, room: _Room) -> None:
        self.low, self.high = np.float32(bounds.low), np.float32(bounds.high)
        self.tied, self.room = bounds.tied, room
        self.above = self.at_low = 0
        self.inside: list[Floats] = []
        self.buffer, self.used = np.empty(0, np.float32), 0
        self.full = False

    def add(self, values: Floats) -> None:
        """Take in more values ``[n]``."""
        if self.full:
            return
        inside = values > self.low
        if self.tied:
            self.at_low += int(np.count_nonzero(values == self.low))
        if self.high < np.inf:
            above = values > self.high
            self.above += int(np.count_nonzero(above))
            inside ^= above
        self._keep(values[inside])

    def _keep(self, kept: Floats) -> None:
        """Copy values into a large buffer: small arrays kept between large temporaries would scatter the heap."""
        self.full = not self.room.take(kept.size)
        if self.full:
            return
        if self.used + kept.size > self.buffer.size:
            self.settle()
            self.buffer = np.empty(max(KEPT_AT_ONCE, kept.size), np.float32)
        self.buffer[self.used : self.used + kept.size] = kept
        self.used += kept.size

    def settle(self) -> None:
        """Put what the buffer holds aside, in no more memory than it takes."""
        if self.used:
            self.inside.append(self.buffer[: self.used].copy())
        self.buffer, self.used = np.empty(0, np.float32), 0

    def merge(self, other: _Tally) -> None:
        """Take in what another thread counted."""
        other.settle()
        self.above += other.above
        self.at_low += other.at_low
        self.inside += other.inside
        self.full |= other.full

    def answer(self, k: int) -> float | None:
        """The k-th largest, if these counts prove it."""
        self.settle()
        values = np.concatenate(self.inside) if self.inside else np.empty(0, np.float32)
        self.inside = []
        if self.full or k <= self.above:
            return None
        place = values.size - (k - self.above)
        if place >= 0:
            values.partition(place)
            return float(values[place])
        return float(self.low) if self.tied and -place <= self.at_low else None


@dataclass(frozen=True)
class _TallyMaker:
    bounds: Bounds
    room: _Room

    def __call__(self) -> _Tally:
        return _Tally(self.bounds, self.room)


class _Histogram(_Counter):
    """Counts of values by 16 bits of their pattern: the upper ones, or the lower for a given upper."""

    def __init__(self, upper: int | None = None) -> None:
        self.upper = upper
        self.counts = np.zeros(1 << 16, np.int64)

    def add(self, values: Floats) -> None:
        """Take in more values ``[n]``."""
        bits = values.view(np.uint32)
        ordered = bits ^ np.where(bits >> 31, np.uint32(0xFFFFFFFF), np.uint32(0x80000000))
        upper = ordered >> np.uint32(16)
        chosen = upper if self.upper is None else ordered[upper == self.upper] & np.uint32(0xFFFF)
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


def _by_bits(views: Sequence[View], population: Population, wanted: Mapping[Key, int]) -> dict[Key, float]:
    """The wanted ranks by two counting passes: always right, never large, slower."""
    counted = _visit(views, population, dict.fromkeys(wanted, _Histogram))
    upper = {key: counted[key].rank(k) for key, k in wanted.items()}
    counted = _visit(views, population, {key: partial(_Histogram, place) for key, (place, _) in upper.items()})
    return {key: _from_bits(place << 16 | counted[key].rank(k)[0]) for key, (place, k) in upper.items()}


def _from_bits(ordered: int) -> float:
    bits = ordered ^ (0x80000000 if ordered >> 31 else 0xFFFFFFFF)
    return float(np.uint32(bits).view(np.float32))


C = TypeVar("C", _Tally, _Histogram)


def _visit(views: Sequence[View], population: Population, make: Mapping[Key, Callable[[], C]]) -> dict[Key, C]:
    """Pass over all ``views`` once and give every value of each row to the counters of that row."""

    totals, lock = {key: new() for key, new in make.items()}, threading.Lock()

    def visit(pieces: list[tuple[View, int, int]]) -> None:
        counters = {key: new() for key, new in make.items()}
        for view, first, stop in pieces:
            for _, base, experts in view.blocks(first=first, stop=stop):
                _count(counters, population, view, base, experts)
        with lock:
            for key, counter in counters.items():
                totals[key].merge(counter)

    views[0].map(visit, spans(views, SPAN))
    return totals


def _count(counters: Mapping[Key, C], population: Population, view: View, base: Tensor, experts: Tensor) -> None:
    places = {row: i for i, row in enumerate(population.rows(view))}
    scores = population.score(view, base, experts).numpy()
    for (row, _), counter in counters.items():
        if row in places:
            counter.add(scores[places[row]])


def _brackets(views: Sequence[View], population: Population, shares: Mapping[Key, float]) -> dict[Key, Bounds]:
    """For each share an interval that very probably holds the value that this share of the row exceeds."""
    total = sum(view.numel for view in views)
    if total <= COLLECT_ALL:
        return dict.fromkeys(shares, Bounds())
    samples: dict[str, list[Floats]] = {row: [] for row, _ in shares}
    for view, start, length in _sample_places(views, total):
        scores = population.score(view, *view.load(start, length)).numpy().copy()
        for row, values in zip(population.rows(view), scores, strict=True):
            if row in samples:
                samples[row].append(values)
    return {key: bracket(samples[key[0]], share) for key, share in shares.items()}


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


def bracket(runs: Sequence[Floats], share: float) -> Bounds:
    """Bounds of the value that a ``share`` of all elements exceeds, five standard errors wide to each side.

    The error is estimated from differences between neighbouring runs, so rows that differ widen it.
    """
    if not runs:
        return Bounds()
    values = np.sort(np.concatenate(runs))[::-1]
    middle = values[min(values.size - 1, int(share * values.size))]
    shares = np.array([np.mean(run >= middle) for run in runs])
    error = math.sqrt(float(np.sum(np.diff(shares) ** 2)) / (2 * max(1, shares.size - 1) * shares.size))
    margin = 5 * error + 8 / values.size
    top, bottom = int((share - margin) * values.size), int((share + margin) * values.size) + 1
    high = float(values[top]) if share > margin else math.inf
    low = float(values[bottom]) if bottom < values.size else -math.inf
    return Bounds(low, high, bool(np.mean(values == low) > TIED))


def shrink_bound(threshold: float) -> float:
    """The largest float32 below ``threshold``: ``|x| >= threshold`` is ``|x| >`` this, what ``hardshrink`` keeps.

    Below zero for a threshold of zero, so that every entry is kept.
    """
    return float(torch.nextafter(torch.tensor(threshold), torch.tensor(-math.inf)).item())
