"""Tensors in, merged blocks out, in order: reading, arithmetic and writing overlap, memory stays within a budget.

Workers take whole groups of blocks; the calling thread hands results to the sink in the order of the plan. At most
``budget`` bytes of blocks are under way. Nothing that a worker computes depends on which worker it is or on how a
tensor is cut, so neither does the output.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Protocol, cast

from torch import Tensor

from retex_cli.merging.budget import first_pass_bytes, fitted, kept_bytes, split
from retex_cli.merging.depth import depths, is_running_statistic
from retex_cli.merging.linear import average
from retex_cli.merging.lines import l1_norms, lines, paper_alpha
from retex_cli.merging.options import Value
from retex_cli.merging.pieces import Copy, Merge, Piece, on_device, pieces
from retex_cli.merging.pool import Pool, Watched, open_pool
from retex_cli.merging.table import MODIFIERS, Method
from retex_cli.merging.view import Kernel, View

__all__ = ["Copy", "Merge", "Sink", "stream"]

AHEAD = 16
"""Tensors whose first passes run ahead of the one being merged, at most and as far as the budget goes."""


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


def stream(
    method: Method,
    steps: Sequence[Merge | Copy],
    sink: Sink,
    *,
    threads: int = 1,
    budget: int = 1 << 28,
    begin: Callable[[str, int], None] = lambda label, total: None,
    advance: Callable[[int], None] = lambda steps: None,
) -> None:
    """Merge and copy ``steps`` in order into ``sink``.

    ``budget`` bounds the bytes under way (at least one tensor is always let through); ``begin(label, total)`` is called
    before a pass over the whole model and before the merge, ``advance(1)`` as a step of either is finished. Raises
    ``RetexError`` for a NaN or infinity in any input, and for a result that does not fit the output dtype.
    """
    views = fitted(method, [step.view for step in steps if isinstance(step, Merge)], threads, budget)
    steps = _with_views(steps, views)
    shares = split(method, views, threads, budget)
    with open_pool(threads) as pool:
        watched = Watched(pool, begin, advance)
        prepare = _Preparation(method, [_with_pool(step, pool, shares.surveyed_values) for step in steps], watched)
        prepare.steps = [_with_pool(step, pool, shares.values) for step in prepare.steps]
        window = _Window(pool, sink, shares.finished, advance)
        ahead = _Ahead(prepare, shares.ahead, window)
        begin("merging", len(steps))
        for step in prepare.steps:
            window.add(step, ahead.next(), partial(ahead.release, step))
        window.drain()


class _Ahead:
    """First passes under way for the tensors to come, in order, within the budget."""

    def __init__(self, prepare: _Preparation, budget: int, window: _Window) -> None:
        self.prepare, self.budget, self.window = prepare, budget, window
        self.coming = deque(prepare.steps)
        self.under_way: deque[tuple[Future[Kernel | None], Merge | Copy]] = deque()
        self.kept = 0

    def next(self) -> Kernel | None:
        """The kernel of the next tensor, once it is ready; ``release`` when it is no longer needed."""
        self._submit()
        future, step = self.under_way.popleft()
        self.kept += self._cost(step, kept_bytes)
        return future.result()

    def release(self, step: Merge | Copy) -> None:
        """The tensor is written: what its first passes left behind is gone."""
        self.kept -= self._cost(step, kept_bytes)

    def _submit(self) -> None:
        while self.coming and len(self.under_way) < AHEAD:
            step = self.coming[0]
            if self._held() + self._cost(step, first_pass_bytes) > self.budget:
                if self.under_way:
                    return
                self.window.drain()
            self.under_way.append((self.window.pool.submit(self.prepare, self.coming.popleft()), step))

    def _held(self) -> int:
        """Bytes of first passes under way and of what earlier ones left behind."""
        coming = (self._cost(s, kept_bytes if future.done() else first_pass_bytes) for future, s in self.under_way)
        return self.kept + sum(coming)

    def _cost(self, step: Merge | Copy, count: Callable[[Method, View], int]) -> int:
        return count(self.prepare.method, step.view) if isinstance(step, Merge) else 0


def _with_views(steps: Sequence[Merge | Copy], views: Sequence[View]) -> list[Merge | Copy]:
    """The merges among the steps with these views, in order."""
    left = iter(views)
    return [replace(step, view=next(left)) if isinstance(step, Merge) else step for step in steps]


def _with_pool(step: Merge | Copy, pool: Pool, values: int) -> Merge | Copy:
    """Tell a tensor who helps with its first passes, and how many values they may collect."""
    return step if isinstance(step, Copy) else replace(step, view=replace(step.view, map=pool.map, room=values))


class _Preparation:
    """What must be known before a tensor's first block: surveys of the model, then first passes over the tensor."""

    def __init__(self, method: Method, steps: Sequence[Merge | Copy], watched: Watched) -> None:
        self.function, self.method, self.watched = cast(MethodFunction, method.function()), method, watched
        self.steps = self._surveyed(cast(SurveyFunction | None, method.survey_function()), steps)
        self.depths = depths(step.view.name for step in self.steps if isinstance(step, Merge))
        self.lines_alpha = self._lines_alpha()

    def __call__(self, step: Merge | Copy) -> Kernel | None:
        """First passes over one tensor; None where there is nothing to compute."""
        if isinstance(step, Copy) or step.view.numel == 0:
            return None
        with on_device(step.view.device):
            return self._with_lines(step)

    def _with_lines(self, step: Merge) -> Kernel:
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
        one_by_one = self.method.granularity != "element"  # their first passes are large
        over = self.watched.one_by_one if one_by_one else self.watched
        norms = over(lambda s: l1_norms(s.view, self._plain(s)) if s.view.numel else (0.0, 0.0), asked)
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
        self.under_way: deque[tuple[Future[Tensor], int] | Callable[[], None]] = deque()
        self.used = 0

    def add(self, step: Merge | Copy, kernel: Kernel | None, written: Callable[[], None]) -> None:
        """Queue every piece of one tensor, writing out finished ones where the budget asks for it."""
        for piece in pieces(step, kernel):
            while self.under_way and self.used + piece.nbytes > self.budget:
                self._write_one()
            self.under_way.append((self.pool.submit(Piece.__call__, piece), piece.nbytes))
            self.used += piece.nbytes
            self._write_finished()
        self.under_way.append(written)
        self._write_finished()

    def drain(self) -> None:
        """Write out all that is left."""
        while self.under_way:
            self._write_one()

    def _write_finished(self) -> None:
        """Write out what nobody need wait for."""
        while self.under_way and (callable(first := self.under_way[0]) or first[0].done()):
            self._write_one()

    def _write_one(self) -> None:
        first = self.under_way.popleft()
        if callable(first):
            first()
            self.advance(1)
            return
        future, nbytes = first
        self.sink.write(future.result())
        self.used -= nbytes
