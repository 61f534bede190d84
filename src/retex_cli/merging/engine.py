"""Tensors in, merged blocks out, in order: reading, arithmetic and writing overlap, memory stays within a budget.

Workers take whole groups of blocks; the calling thread hands results to the sink in the order of the plan. At most
``budget`` bytes of blocks are under way. Nothing that a worker computes depends on which worker it is or on how a
tensor is cut, so neither does the output.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor

from retex_cli.errors import RetexError
from retex_cli.merging.budget import DEFAULT, GROUP_ELEMENTS, first_pass_bytes
from retex_cli.merging.depth import depths, is_running_statistic
from retex_cli.merging.linear import average
from retex_cli.merging.lines import l1_norms, lines, paper_alpha
from retex_cli.merging.options import Value
from retex_cli.merging.pool import Pool, Watched, pool_of
from retex_cli.merging.table import MODIFIERS, Method
from retex_cli.merging.view import Kernel, Source, View, check_finite

A = TypeVar("A")
B = TypeVar("B")

AHEAD = 16
"""Tensors whose first passes run ahead of the one being merged, at most and as far as the budget goes."""


@dataclass(frozen=True)
class Merge:
    """A tensor to merge by ``method`` with ``options``, written as ``dtype``."""

    view: View
    options: Mapping[str, Value]
    dtype: torch.dtype


@dataclass(frozen=True)
class Copy:
    """A tensor to copy from one source, written as ``dtype``."""

    source: Source
    numel: int
    dtype: torch.dtype


class MethodFunction(Protocol):
    """One row of the table: first passes over a tensor, then how its blocks are merged."""

    def __call__(self, view: View, **options: Value) -> Kernel: ...


class SurveyFunction(Protocol):
    """What a method must know of the whole model; each of its tensors gets the result as ``view.survey``."""

    def __call__(self, views: Sequence[View], **options: Value) -> object: ...


class Sink(Protocol):
    """Where finished blocks go, in order."""

    def write(self, data: Tensor) -> None:
        """The next elements, in the tensor's own output dtype."""


@dataclass(frozen=True)
class Piece:
    """A run of blocks of one tensor: elements ``start .. stop``."""

    start: int
    stop: int
    work: Callable[[int, int], Tensor]

    def __call__(self) -> Tensor:
        return self.work(self.start, self.stop)


def stream(
    method: Method,
    steps: Sequence[Merge | Copy],
    sink: Sink,
    *,
    threads: int | None = None,
    budget: int = 1 << 28,
    begin: Callable[[str, int], None] = lambda label, total: None,
    advance: Callable[[int], None] = lambda steps: None,
) -> None:
    """Merge and copy ``steps`` in order into ``sink``.

    ``budget`` bounds the bytes of blocks under way (at least one is always let through); ``begin(label, total)`` is
    called before a pass over the whole model and before the merge, ``advance(1)`` as a step of either is finished.
    Raises ``RetexError`` for a NaN or infinity in any input, and for a result that does not fit the output dtype.
    """
    with pool_of(threads) as pool:
        watched = Watched(pool, begin, advance)
        prepare = _Preparation(method, [_with_pool(step, pool, budget) for step in steps], pool, watched)
        finished = min(budget // 2, DEFAULT)
        ahead = _Ahead(prepare, budget - finished)
        window = _Window(pool, sink, finished, advance)
        begin("merging", len(steps))
        for step in prepare.steps:
            window.add(step, ahead.next())
        window.drain()


class _Ahead:
    """First passes under way for the tensors to come, in order, within the budget."""

    def __init__(self, prepare: _Preparation, budget: int) -> None:
        self.prepare, self.budget = prepare, budget
        self.coming = deque(prepare.steps)
        self.under_way: deque[tuple[Future[Kernel | None], int]] = deque()

    def next(self) -> Kernel | None:
        """The kernel of the next tensor, once it is ready."""
        self._submit()
        return self.under_way.popleft()[0].result()

    def _submit(self) -> None:
        while self.coming and len(self.under_way) < AHEAD:
            cost = self._cost(self.coming[0])
            if self.under_way and cost + sum(other for _, other in self.under_way) > self.budget:
                return
            self.under_way.append((self.prepare.pool.submit(self.prepare, self.coming.popleft()), cost))

    def _cost(self, step: Merge | Copy) -> int:
        return first_pass_bytes(self.prepare.method, step.view) if isinstance(step, Merge) else 0


def _with_pool(step: Merge | Copy, pool: Pool, budget: int) -> Merge | Copy:
    """Tell a tensor who helps with its first passes, and how many values they may hold: half the budget."""
    if isinstance(step, Copy):
        return step
    return replace(step, view=replace(step.view, map=pool.map, room=max(1 << 16, budget // 8)))


class _Preparation:
    """What must be known before a tensor's first block: surveys of the model, then first passes over the tensor."""

    def __init__(self, method: Method, steps: Sequence[Merge | Copy], pool: Pool, watched: Watched) -> None:
        self.function, self.method, self.pool = cast(MethodFunction, method.function()), method, pool
        self.watched = watched
        self.steps = self._surveyed(cast(SurveyFunction | None, method.survey_function()), steps)
        self.depths = depths(step.view.name for step in self.steps if isinstance(step, Merge))
        self.lines_alpha = self._lines_alpha()

    def __call__(self, step: Merge | Copy) -> Kernel | None:
        """First passes over one tensor; None where there is nothing to compute."""
        if isinstance(step, Copy) or step.view.numel == 0:
            return None
        kernel = self._plain(step)
        if "lines" not in step.options or is_running_statistic(step.view.name):
            return kernel
        given = step.options["lines_alpha"]
        alpha = self.lines_alpha if given == "auto" else cast(float, given)
        return lines(kernel, alpha, cast(float, step.options["lines"]), self.depths[step.view.name])

    def _plain(self, step: Merge) -> Kernel:
        """The method itself; running statistics of a BatchNorm are averaged, whatever the method."""
        if is_running_statistic(step.view.name) and self.function is not average:
            return average(step.view)
        return self.function(step.view, **own_options(step.options))

    def _surveyed(self, survey: SurveyFunction | None, steps: Sequence[Merge | Copy]) -> Sequence[Merge | Copy]:
        """Let the method look at all tensors with the same options together; each of them is told what it found."""
        if survey is None:
            return steps
        groups: dict[tuple[tuple[str, Value], ...], list[View]] = {}
        for step in steps:
            if isinstance(step, Merge) and not is_running_statistic(step.view.name):
                groups.setdefault(_key(step), []).append(replace(step.view, map=self.watched))
        found = {key: survey(views, **dict(key)) for key, views in groups.items()}
        return [
            replace(step, view=replace(step.view, survey=found.get(_key(step)))) if isinstance(step, Merge) else step
            for step in steps
        ]

    def _lines_alpha(self) -> float:
        """The paper's scale for LiNeS, where one is asked for: it takes a merge of the whole model to know it."""
        asked = [s for s in self.steps if isinstance(s, Merge) and s.options.get("lines_alpha") == "auto"]
        if not asked:
            return 1.0
        norms = self.watched(lambda s: l1_norms(s.view, self._plain(s)) if s.view.numel else (0.0, 0.0), asked)
        return paper_alpha(norms, max(len(s.view.tasks) for s in asked))


def own_options(options: Mapping[str, Value]) -> dict[str, Value]:
    """The options of the method itself, without the modifiers."""
    modifiers = {option.name for option in MODIFIERS}
    return {name: value for name, value in options.items() if name not in modifiers}


def _key(step: Merge) -> tuple[tuple[str, Value], ...]:
    return tuple(sorted(own_options(step.options).items()))


class _Window:
    """Pieces under way, first in, first out, within a budget of bytes."""

    def __init__(self, pool: Pool, sink: Sink, budget: int, advance: Callable[[int], None]) -> None:
        self.pool, self.sink, self.budget, self.advance = pool, sink, budget, advance
        self.under_way: deque[tuple[Future[Tensor] | None, int]] = deque()
        self.used = 0

    def add(self, step: Merge | Copy, kernel: Kernel | None) -> None:
        """Queue every piece of one tensor, writing out finished ones where the budget asks for it."""
        for piece, cost in _pieces(step, kernel):
            while self.under_way and self.used + cost > self.budget:
                self._write_one()
            self.under_way.append((self.pool.submit(Piece.__call__, piece), cost))
            self.used += cost
            while self.under_way and (future := self.under_way[0][0]) is not None and future.done():
                self._write_one()
        self.under_way.append((None, 0))

    def drain(self) -> None:
        """Write out all that is left."""
        while self.under_way:
            self._write_one()

    def _write_one(self) -> None:
        future, cost = self.under_way.popleft()
        if future is None:
            self.advance(1)
            return
        self.sink.write(future.result())
        self.used -= cost


def _pieces(step: Merge | Copy, kernel: Kernel | None) -> Iterator[tuple[Piece, int]]:
    """The pieces of one tensor, each with the bytes it needs while under way."""
    if isinstance(step, Copy):
        for start in range(0, step.numel, GROUP_ELEMENTS):
            stop = min(start + GROUP_ELEMENTS, step.numel)
            yield Piece(start, stop, lambda start, stop: _copy(step, start, stop)), (stop - start) * step.dtype.itemsize
    elif kernel is not None:
        view, chosen = step.view, kernel
        length = view.block_length(chosen.unit)
        group = -(-GROUP_ELEMENTS // length) * length
        inputs = 4 * (len(view.experts) + 1) * length
        for start in range(0, view.numel, group):
            stop = min(start + group, view.numel)
            cost = (stop - start) * step.dtype.itemsize + (0 if chosen.unit < view.row else inputs)
            yield Piece(start, stop, lambda start, stop: _merge(step, chosen, length, start, stop)), cost


def _copy(step: Copy, start: int, stop: int) -> Tensor:
    out = torch.empty(stop - start, dtype=step.dtype)
    step.source.read_into(start, out)
    if out.is_floating_point():
        check_finite(out, step.source.where, start)
    return out


def _merge(step: Merge, kernel: Kernel, length: int, start: int, stop: int) -> Tensor:
    """Elements ``start .. stop`` of the merged tensor, in the output dtype, on the CPU."""
    out = torch.empty(stop - start, dtype=step.dtype)
    device = step.view.device
    for at in range(start, stop, length):
        base, experts = step.view.load(at, min(length, stop - at), kernel.base_only)
        if device.type != "cpu":
            base, experts = base.to(device), experts.to(device)
        out[at - start : at - start + base.numel()] = kernel.merge(base, experts, at)
    if not math.isfinite(out.sum(dtype=torch.float32).item()) and not bool(torch.isfinite(out).all()):
        raise RetexError(
            f"tensor {step.view.name!r} does not fit {str(step.dtype).removeprefix('torch.')} once merged",
            "write a wider type, for instance with --dtype float32, or lower alpha",
        )
    return out
