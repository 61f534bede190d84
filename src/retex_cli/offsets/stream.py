"""The byte form of one task's offsets.

All shared tensors in the order of the merged checkpoint's sorted names, whose shapes both sides know. Sequences, in
this order, through ``coder``: components per tensor; their levels; the base-two logarithms of their scales in eighths;
for every context in use the shifts of its decoded values; then the symbols of every context. A context is all vectors
of one level and one kind, in the order of tensors and components.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from retex_cli.offsets import coder
from retex_cli.offsets.quantiser import LEVELS, SHIFTS, dequantise

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
    """Decoded components of one tensor: float32 ``left`` [m, k] and ``right`` [k, n], None for one-dimensional ones."""

    left: Tensor
    right: Tensor | None

    def delta(self, shape: Shape, device: torch.device, out: Tensor | None = None) -> Tensor:
        """The offset, float32 of ``shape`` on ``device``, in memory of its own or in ``out``, such a tensor."""
        if out is None:
            out = torch.empty(shape, dtype=torch.float32, device=device)
        left = self.left.to(device)
        if self.right is None:
            return out.copy_(left.reshape(shape))
        torch.mm(left, self.right.to(device), out=out.view(len(left), -1))
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.left.nbytes + (0 if self.right is None else self.right.nbytes)

    def to(self, device: torch.device) -> Factors:
        """The same on another device."""
        return Factors(self.left.to(device), None if self.right is None else self.right.to(device))


def decode(data: bytes, layout: Sequence[tuple[str, Shape]]) -> dict[str, Factors]:
    """Factors by tensor name; tensors without a component are absent.

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
    plan = _plan(layout, counts, levels, scales)
    symbols = sequences[4:]
    del sequences[4:]  # the pools take the last reference to each, or both forms would be in memory at once
    return _assemble(plan, _Pools(plan, sequences[3], symbols))


@dataclass(frozen=True)
class _Tensor:
    """One tensor to be put together: ``kept`` is (level, scale) of every component."""

    name: str
    left: int
    right: int
    kept: Pairs


def _plan(
    layout: Sequence[tuple[str, Shape]], counts: coder.Integers, levels: coder.Integers, scales: coder.Integers
) -> list[_Tensor]:
    plan, start = [], 0
    for (name, shape), count in zip(layout, counts.tolist(), strict=True):
        left, right = sides(shape)
        if count > (min(left, right) if right else 1):
            raise coder.CorruptOffsets(f"{count} components announced for {name} of shape {list(shape)}")
        kept = list(zip(levels[start : start + count].tolist(), scales[start : start + count].tolist(), strict=True))
        start += count
        if kept:
            plan.append(_Tensor(name, left, right, kept))
    return plan


class _Pools:
    """The decoded entries of every context, handed out in order; empties the list of symbols."""

    def __init__(self, plan: list[_Tensor], shifts: coder.Integers, symbols: list[coder.Integers]) -> None:
        needed: dict[Context, int] = {}
        for tensor in plan:
            for level, _ in tensor.kept:
                for context, length in zip(
                    contexts(level, tensor.left, tensor.right), (tensor.left, tensor.right), strict=True
                ):
                    if length:
                        needed[context] = needed.get(context, 0) + length
        used = sorted(needed)
        if [needed[context] for context in used] != [len(sequence) for sequence in symbols]:
            raise coder.CorruptOffsets("the numbers of symbols disagree")
        if len(shifts) != SHIFTS * len(used):
            raise coder.CorruptOffsets("the numbers of shifts disagree")
        self._values: dict[Context, Tensor] = {}
        for i, context in enumerate(used):
            of_context = shifts[SHIFTS * i : SHIFTS * (i + 1)].tolist()
            self._values[context] = dequantise(torch.from_numpy(symbols.pop(0)), context[0], of_context)
        self._used = dict.fromkeys(used, 0)

    def take(self, context: Context, length: int) -> Tensor:
        """The next ``length`` entries, float32."""
        self._used[context] += length
        return self._values[context][self._used[context] - length : self._used[context]]


def _assemble(plan: list[_Tensor], pools: _Pools) -> dict[str, Factors]:
    factors = {}
    for tensor in plan:
        lefts, rights = [], []
        for level, _ in tensor.kept:
            of_left, of_right = contexts(level, tensor.left, tensor.right)
            lefts.append(pools.take(of_left, tensor.left))
            if tensor.right:
                rights.append(pools.take(of_right, tensor.right))
        scales = torch.tensor([scale_value(scale) for _, scale in tensor.kept])
        right = torch.stack(rights) / math.sqrt(tensor.right) if rights else None
        factors[tensor.name] = Factors(torch.stack(lefts, 1) * scales, right)
    return factors
