"""The byte form of one task's offsets.

All shared tensors in the order of the merged checkpoint's sorted names, whose shapes both sides know. Sequences, in
this order, through ``coder``: components per tensor; their levels; the base-two logarithms of their scales in eighths;
for every context in use the shifts of its decoded values; then the symbols of every context. A context is all vectors
of one level and one kind, in the order of tensors and components.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from retex_cli.offsets import coder
from retex_cli.offsets.quantiser import LEVELS, SHIFTS, Levels

SCALE_STEPS = 8
"""Scale codes per factor of two. Symbols are relative to the coded scale, so its coarseness costs no accuracy."""
LONG = 4096
"""Vectors this long have their own statistics: columns of embedding tables, most of whose rows hardly moved."""
RIGHT, LEFT, VECTOR = range(3)

Shape = tuple[int, ...]
Context = tuple[int, int]
Pairs = list[tuple[int, int]]


@dataclass(frozen=True)
class Coded:
    """One component: integer symbols of its right (None for one-dimensional tensors) and left vector."""

    level: int
    scale: int
    left: Tensor
    right: Tensor | None


def scale_code(root_mean_square: float) -> int:
    """The nearest coded scale, in eighths of a factor of two."""
    return round(SCALE_STEPS * math.log2(root_mean_square))


def scale_value(code: int) -> float:
    """What a coded scale stands for."""
    return math.pow(2.0, code / SCALE_STEPS)


def sides(shape: Shape) -> tuple[int, int]:
    """(entries of a left vector, entries of a right vector); 0 right entries for vectors and scalars."""
    if len(shape) < 2:
        return math.prod(shape), 0
    return shape[0], math.prod(shape[1:])


def finer(left: int, right: int) -> tuple[int, int]:
    """How many levels finer than the component's own its (left, right) vector is quantised.

    Both errors add up, and a bit an entry costs each side its length, so at the best split the errors are in proportion
    to the lengths: half a bit finer for every halving.
    """
    if not left or not right:
        return 0, 0
    difference = round(math.log2(left / right))
    return max(-difference, 0), max(difference, 0)


def contexts(level: int, left: int, right: int) -> tuple[Context, Context]:
    """The contexts of the (left, right) vector of a component; the right one means nothing for one-dimensional ones."""
    if not right:
        return (level, 2 * VECTOR), (-1, -1)
    finer_left, finer_right = finer(left, right)
    return (
        (level + finer_left, 2 * LEFT + int(left >= LONG)),
        (level + finer_right, 2 * RIGHT + int(right >= LONG)),
    )


def encode(tensors: Sequence[Sequence[Coded]], shifts: dict[Context, list[int]]) -> bytes:
    """Bytes of the components of all tensors, in layout order; ``shifts`` for every context in use."""
    components = [component for tensor in tensors for component in tensor]
    symbols: dict[Context, list[coder.Integers]] = {}
    for component in components:
        right = 0 if component.right is None else len(component.right)
        of_left, of_right = contexts(component.level, len(component.left), right)
        symbols.setdefault(of_left, []).append(component.left.numpy().astype(np.int64))
        if component.right is not None:
            symbols.setdefault(of_right, []).append(component.right.numpy().astype(np.int64))
    used = sorted(symbols)
    return coder.encode(
        [
            np.array([len(tensor) for tensor in tensors], dtype=np.int64),
            _differences([component.level for component in components]),
            _differences([component.scale for component in components]),
            np.array([shift for context in used for shift in shifts[context]], dtype=np.int64),
            *(np.concatenate(symbols[context]) for context in used),
        ]
    )


def _differences(values: list[int]) -> coder.Integers:
    array = np.array([0, *values], dtype=np.int64)
    return array[1:] - array[:-1]


@dataclass(frozen=True)
class Factors:
    """Decoded components of one tensor: ``left`` [m, k] and ``right`` [k, n], None for one-dimensional ones; float32
    unless they were rounded."""

    left: Tensor
    right: Tensor | None

    def add_to(self, total: Tensor, start: int, share: float = 1.0) -> Tensor:
        """``total``, flat, of the factors' type and on their device, with ``share`` of the offset's elements from
        ``start`` on added to it in place: whole rows, or part of one.

        The bits of a sum depend on its shape, so what must have the same ones asks for the same elements.
        """
        if self.right is None:
            return total.add_(self.left.reshape(-1)[start : start + len(total)], alpha=share)
        row, column = divmod(start, self.right.shape[1])
        columns = min(len(total), self.right.shape[1])
        left, right = self.left[row : row + len(total) // columns], self.right[:, column : column + columns]
        total.view(len(left), columns).addmm_(left, right, alpha=share)
        return total

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.left.nbytes + (0 if self.right is None else self.right.nbytes)

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Factors:
        """The same on another device, or rounded to another type."""
        return Factors(self.left.to(device, dtype), None if self.right is None else self.right.to(device, dtype))


def decode(data: bytes, layout: Sequence[tuple[str, Shape]]) -> Mapping[str, Factors]:
    """Factors by tensor name; tensors without a component are absent.

    Only symbols are in memory, a byte each or two: a tensor's factors are made each time they are asked for.
    Raises ``coder.CorruptOffsets`` when the bytes do not fit the layout.
    """
    most = sum((sum(sides(shape)) + 3) * (min(sides(shape)) or 1) for _, shape in layout) + len(layout) + 1000
    sequences = coder.decode(data, max_symbols=most)
    if len(sequences) < 4 or len(sequences[0]) != len(layout):
        raise coder.CorruptOffsets("the offsets describe another set of tensors")
    counts, levels, scales = sequences[0], np.cumsum(sequences[1]), np.cumsum(sequences[2])
    if counts.min(initial=0) < 0 or counts.sum() != len(levels) or len(levels) != len(scales):
        raise coder.CorruptOffsets("the numbers of components disagree")
    if len(levels) and not (levels.min() >= 0 and levels.max() < LEVELS and abs(scales).max() < 1000):
        raise coder.CorruptOffsets("a level or a scale is out of range")
    plan, used = _plan(layout, counts, levels, scales)
    contexts_in_order = sorted(used)
    if [used[context] for context in contexts_in_order] != [len(sequence) for sequence in sequences[4:]]:
        raise coder.CorruptOffsets("the numbers of symbols disagree")
    if len(sequences[3]) != SHIFTS * len(used):
        raise coder.CorruptOffsets("the numbers of shifts disagree")
    shifts = sequences[3].reshape(-1, SHIFTS).tolist()
    pools = {
        context: Levels(torch.from_numpy(symbols), context[0], of_context)
        for context, symbols, of_context in zip(contexts_in_order, sequences[4:], shifts, strict=True)
    }
    return _Decoded(plan, pools)


@dataclass(frozen=True)
class _Run:
    """Components of one tensor that stand side by side in their contexts, from these positions on."""

    components: int
    left: tuple[Context, int]
    right: tuple[Context, int]


@dataclass(frozen=True)
class _Tensor:
    """One tensor to be put together: entries of its vectors, a scale code for every component, and where they lie."""

    left: int
    right: int
    scales: list[int]
    runs: list[_Run]


def _plan(
    layout: Sequence[tuple[str, Shape]], counts: coder.Integers, levels: coder.Integers, scales: coder.Integers
) -> tuple[dict[str, _Tensor], dict[Context, int]]:
    """Tensors with components by name, and how many entries each context has."""
    plan, start, used = {}, 0, dict[Context, int]()
    for (name, shape), count in zip(layout, counts.tolist(), strict=True):
        left, right = sides(shape)
        if count > (min(left, right) if right else 1):
            raise coder.CorruptOffsets(f"{count} components announced for {name} of shape {list(shape)}")
        runs = []
        for level, same in groupby(levels[start : start + count].tolist()):
            components = len(list(same))
            of_left, of_right = contexts(level, left, right)
            runs.append(_Run(components, (of_left, used.get(of_left, 0)), (of_right, used.get(of_right, 0))))
            used[of_left] = used.get(of_left, 0) + components * left
            if right:
                used[of_right] = used.get(of_right, 0) + components * right
        if count:
            plan[name] = _Tensor(left, right, scales[start : start + count].tolist(), runs)
        start += count
    return plan, used


class _Decoded(Mapping[str, Factors]):
    """Factors, put together when they are asked for."""

    def __init__(self, plan: Mapping[str, _Tensor], pools: Mapping[Context, Levels]) -> None:
        self._plan = plan
        self._pools = pools

    def __getitem__(self, name: str) -> Factors:
        tensor = self._plan[name]
        count = len(tensor.scales)
        left = self._vectors([(*run.left, run.components) for run in tensor.runs], count, tensor.left)
        left.mul_(torch.tensor([scale_value(scale) for scale in tensor.scales])[:, None])
        if not tensor.right:
            return Factors(left.t(), None)
        right = self._vectors([(*run.right, run.components) for run in tensor.runs], count, tensor.right)
        return Factors(left.t(), right.div_(math.sqrt(tensor.right)))  # left columns lie side by side, as stored

    def _vectors(self, runs: Sequence[tuple[Context, int, int]], count: int, entries: int) -> Tensor:
        """float32 [count, entries] from runs of some vectors in a context, from a position on."""
        vectors, done = torch.empty(count, entries), 0
        for context, start, components in runs:
            self._pools[context].take(start, vectors[done : done + components].view(-1))
            done += components
        return vectors

    def __iter__(self) -> Iterator[str]:
        return iter(self._plan)

    def __len__(self) -> int:
        return len(self._plan)
