"""What a merge method sees of one tensor: its shape, the tasks, and blocks of it, never a file.

A method is a function ``method(view, **options) -> Kernel``. It may pass over the tensor first (``view.blocks``,
``selection.top_magnitudes``) and returns the kernel that merges one block. So one function serves tensors in memory
and checkpoints streamed from disk, and nothing depends on where a block begins.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from retex_cli.errors import RetexError

A = TypeVar("A")
B = TypeVar("B")

GRID = 4096
"""Blocks begin at multiples of this many elements (or of a row), whatever their size."""

BLOCK_ELEMENTS = 1 << 20
"""Elements of all inputs together in one block: 4 MB of float32. Smaller ones stay in a second-level cache of 2 MB but
cost more than that gains: every call takes the interpreter's lock, and two workers wait for each other."""

CUDA_BLOCK_ELEMENTS = 1 << 24
"""The same on a GPU, where a call costs more and memory is fast."""


class Source(Protocol):
    """One tensor of one checkpoint, wherever it lives."""

    @property
    def where(self) -> str:
        """Tensor and file, for messages."""

    def read_into(self, start: int, out: Tensor) -> None:
        """Fill ``out`` (1-D, contiguous) with the elements from ``start``, converted to its dtype. Thread-safe."""


@runtime_checkable
class LowRank(Protocol):
    """A source that may know its task vector as a product of two thin matrices."""

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """``left [m, r]`` and ``right [r, n]``, the task vector of ``d_out x rest`` being ``left @ right``; or None.

        A source with more rows than the base's may give the rows of all.
        """


@dataclass(frozen=True, slots=True)
class Kernel:
    """How one block is merged.

    ``merge(base, experts, start)`` gets float32 ``base [n]`` and ``experts [T, n]`` from element ``start`` on, may use
    both as scratch, and returns the merged weights ``[n]``. Blocks hold whole multiples of ``unit`` elements (a row, or
    the whole tensor), apart from the last. ``base_only``: the experts are known already, ``experts`` is ``[0, n]``.
    """

    merge: Callable[[Tensor, Tensor, int], Tensor]
    unit: int = 1
    base_only: bool = False


class _Scratch(threading.local):
    """Per-thread memory for one block of every input, reused from block to block."""

    def __init__(self) -> None:
        self.memory = torch.empty(0)

    def rows(self, count: int, length: int, pinned: bool) -> Tensor:
        if self.memory.numel() < count * length or self.memory.is_pinned() != pinned:
            self.memory = torch.empty(count * length, pin_memory=pinned)
        return self.memory[: count * length].view(count, length)


_scratch = _Scratch()


def map_serially(function: Callable[[A], B], items: Iterable[A]) -> list[B]:
    """The parallel map of a caller without threads."""
    return [function(item) for item in items]


class ParallelMap(Protocol):
    """Applies a function to items, perhaps in several threads, and returns the results in order."""

    def __call__(self, function: Callable[[A], B], items: Iterable[A]) -> list[B]: ...


@dataclass(frozen=True)
class View:
    """One shared tensor: the base's and, for ``tasks`` in the same order, the experts'."""

    name: str
    shape: tuple[int, ...]
    tasks: tuple[str, ...]
    base: Source
    experts: tuple[Source, ...]
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    survey: object = None
    """What the method's survey of the whole model returned."""
    statistics: tuple[Source, ...] = ()
    """Per task what was measured on its inputs for this tensor, for methods that need it; empty where there is none."""
    map: ParallelMap = map_serially
    room: int = 1 << 24
    """How many values the selection of order statistics may hold."""
    block: int | None = None
    """Elements of all inputs together in one block, where memory is short; None for what is fastest."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def row(self) -> int:
        """Elements in one row of the 2-D view ``d_out x rest``; all of them for a vector."""
        return math.prod(self.shape[1:]) if len(self.shape) > 1 else self.numel

    def block_length(self, unit: int = 1) -> int:
        """Length of a block: whole units, on the grid, about ``block`` elements over all inputs."""
        usual = BLOCK_ELEMENTS if self.device.type == "cpu" else CUDA_BLOCK_ELEMENTS
        target = max(1, (self.block or usual) // (len(self.experts) + 1))
        if unit >= self.numel:
            return max(self.numel, 1)
        return -(-target // unit) * unit if unit > 1 else max(GRID, target // GRID * GRID)

    def factors(self) -> tuple[tuple[Tensor, Tensor], ...] | None:
        """Per task ``left [m, r]`` and ``right [r, n]``, float64, of a task vector; None if one is not of low rank."""
        found = []
        for source in self.experts:
            pair = source.factors() if isinstance(source, LowRank) and len(self.shape) > 1 else None
            if pair is None:
                return None
            for values in pair:
                check_finite(values.flatten(), f"{source.where}, one of its factors,")
            found.append((pair[0][: self.shape[0]].to(self.device).double(), pair[1].to(self.device).double()))
        return tuple(found)

    def load(self, start: int, length: int, base_only: bool = False) -> tuple[Tensor, Tensor]:
        """Elements ``start .. start + length`` as float32 ``base [n]`` and ``experts [T, n]``, checked to be finite.

        They lie on the CPU in this thread's scratch memory (page-locked if the view's device is a GPU): the next call
        overwrites them.
        """
        experts = () if base_only else self.experts
        rows = _scratch.rows(len(experts) + 1, length, self.device.type == "cuda")
        self.base.read_into(start, rows[0])
        for source, out in zip(experts, rows[1:].unbind(0), strict=True):
            source.read_into(start, out)
        if not math.isfinite(rows.sum().item()):
            self._locate(rows, start)
        return rows[0], rows[1:]

    def blocks(
        self, unit: int = 1, first: int = 0, stop: int | None = None, *, base_only: bool = False
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """``(start, base [n], experts [T, n])`` block by block, in scratch memory."""
        stop, length = self.numel if stop is None else stop, self.block_length(unit)
        for start in range(first, stop, length):
            yield start, *self.load(start, min(length, stop - start), base_only)

    def _locate(self, rows: Tensor, start: int) -> None:
        """Raise for the first value that is not finite; return if only the sum overflowed."""
        for source, values in zip((self.base, *self.experts)[: len(rows)], rows.unbind(0), strict=True):
            check_finite(values, source.where, start)


def check_finite(values: Tensor, where: str, start: int = 0) -> None:
    """Raise ``RetexError`` naming ``where`` and the element if one of ``values [n]`` is NaN or infinite."""
    bad = torch.isfinite(values).logical_not_().nonzero()
    if bad.numel():
        index = int(bad[0].item())
        raise RetexError(
            f"{where} holds {values[index].item()} at element {start + index}",
            "the checkpoint is broken: train or download it again",
        )


def spans(views: Sequence[View], length: int) -> list[list[tuple[View, int, int]]]:
    """Cut tensors into pieces ``(view, first, stop)`` on the grid and group small ones, about ``length`` per group."""
    groups: list[list[tuple[View, int, int]]] = [[]]
    room = length
    for view in views:
        for first in range(0, view.numel, length):
            stop = min(first + length, view.numel)
            if stop - first > room and groups[-1]:
                groups.append([])
                room = length
            groups[-1].append((view, first, stop))
            room -= stop - first
    return [group for group in groups if group]
