"""Tensors in, merged blocks out, in order: reading, arithmetic and writing overlap, memory stays within a budget.

Workers take whole groups of blocks; the calling thread hands results to the sink in the order of the plan. At most
``budget`` bytes of blocks are under way. Nothing that a worker computes depends on which worker it is or on how a
tensor is cut, so neither does the output.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from retex_cli.errors import RetexError
from retex_cli.merging.table import Method, Value
from retex_cli.merging.view import BLOCK_ELEMENTS, GRID, Kernel, Source, View, check_finite

A = TypeVar("A")
B = TypeVar("B")

AHEAD = 16
"""Tensors whose first passes (thresholds) run ahead of the one being merged."""
GROUP_ELEMENTS = 1 << 19
"""Elements of output that a worker makes in one go."""


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


class Sink(Protocol):
    """Where finished blocks go, in order."""

    def write(self, data: Tensor) -> None:
        """The next elements, in the tensor's own output dtype."""


class Pool:
    """Worker threads that each run torch on one thread."""

    def __init__(self, threads: int) -> None:
        self._executor = ThreadPoolExecutor(threads, "merge", initializer=torch.set_num_threads, initargs=(1,))

    def submit(self, function: Callable[[A], B], item: A) -> Future[B]:
        """Run ``function(item)`` when a thread is free; first come, first served."""
        return self._executor.submit(function, item)

    def map(self, function: Callable[[A], B], items: Iterable[A]) -> list[B]:
        """Results in order. The caller lends a hand with what no thread has begun, so a worker may call it too."""
        pending = [(item, self.submit(function, item)) for item in items]
        return [function(item) if future.cancel() else future.result() for item, future in pending]

    def close(self) -> None:
        """Drop what has not begun and wait for the rest."""
        self._executor.shutdown(cancel_futures=True)


def default_threads() -> int:
    """One worker per core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def least_budget(method: Method, steps: Sequence[Merge | Copy], threads: int | None) -> int:
    """Bytes that ``method`` holds at least: every worker's block, and the largest tensor if it works on whole ones."""
    views = [step.view for step in steps if isinstance(step, Merge)]
    width = max((len(view.experts) + 1 for view in views), default=1)
    blocks = (threads or default_threads()) * 4 * (max(BLOCK_ELEMENTS, width * GRID) + GROUP_ELEMENTS)
    if method.granularity == "element":
        return blocks
    return blocks + max((8 * view.numel * (len(view.experts) + 1) for view in views), default=0)


@contextmanager
def _pool(threads: int | None) -> Iterator[Pool]:
    """A pool of workers; this thread's torch runs on one thread meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = Pool(threads or default_threads())
    try:
        yield pool
    finally:
        pool.close()
        torch.set_num_threads(before)


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
    advance: Callable[[int], None] = lambda steps: None,
) -> None:
    """Merge and copy ``steps`` in order into ``sink``.

    ``budget`` bounds the bytes of blocks under way (at least one is always let through); ``advance(1)`` is called as
    each tensor is finished. Raises ``RetexError`` for a NaN or infinity in any input, and for a result that does not
    fit the output dtype.
    """
    with _pool(threads) as pool:
        steps = _survey(method, [_with_pool(step, pool) for step in steps], pool)
        kernels: deque[Future[Kernel | None]] = deque()
        ahead = iter(steps)
        window = _Window(pool, sink, budget, advance)
        for step in steps:
            for upcoming in ahead:
                kernels.append(pool.submit(lambda upcoming: _prepare(method, upcoming), upcoming))
                if len(kernels) > AHEAD:
                    break
            window.add(step, kernels.popleft().result())
        window.drain()


def _with_pool(step: Merge | Copy, pool: Pool) -> Merge | Copy:
    return replace(step, view=replace(step.view, map=pool.map)) if isinstance(step, Merge) else step


def _survey(method: Method, steps: Sequence[Merge | Copy], pool: Pool) -> Sequence[Merge | Copy]:
    """Let the method look at all tensors with the same options together, and hand each of them what it found."""
    survey = method.survey_function()
    if survey is None:
        return steps
    groups: dict[tuple[tuple[str, Value], ...], list[View]] = {}
    for step in steps:
        if isinstance(step, Merge):
            groups.setdefault(tuple(sorted(step.options.items())), []).append(step.view)
    found = {key: survey(views, **dict(key)) for key, views in groups.items()}  # type: ignore[operator]
    return [
        replace(step, view=replace(step.view, survey=found[tuple(sorted(step.options.items()))]))
        if isinstance(step, Merge)
        else step
        for step in steps
    ]


def _prepare(method: Method, step: Merge | Copy) -> Kernel | None:
    """First passes over one tensor; None where there is nothing to compute."""
    if isinstance(step, Copy) or step.view.numel == 0:
        return None
    kernel = method.function()(step.view, **step.options)  # type: ignore[operator]
    assert isinstance(kernel, Kernel)
    return kernel


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
        base, experts = step.view.load(at, min(length, stop - at))
        if device.type != "cpu":
            base, experts = base.to(device), experts.to(device)
        out[at - start : at - start + base.numel()] = kernel.merge(base, experts, at)
    if not math.isfinite(out.sum(dtype=torch.float32).item()) and not bool(torch.isfinite(out).all()):
        raise RetexError(
            f"tensor {step.view.name!r} does not fit {str(step.dtype).removeprefix('torch.')} once merged",
            "write a wider type, for instance with --dtype float32, or lower alpha",
        )
    return out
