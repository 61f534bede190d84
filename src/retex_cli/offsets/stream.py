"""The byte form of one task's offsets.

All shared tensors in the order of the merged checkpoint's sorted names, whose shapes both sides know. Sequences, in
this order, through ``coder``: components per tensor; their levels; the base-two logarithms of their scales in eighths;
then for every (level, kind) in use the symbols of all its vectors, the right vector of a component before its left one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from retex_cli.offsets import coder
from retex_cli.offsets.quantiser import LEVELS, dequantise

SCALE_STEPS = 8
"""Scale codes per factor of two. Symbols are relative to the coded scale, so its coarseness costs no accuracy."""
LONG = 4096
"""Vectors this long have their own statistics: they are rows of embedding tables, most of them hardly moved."""

Shape = tuple[int, ...]


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


def _context(level: int, length: int, one_dimensional: bool) -> tuple[int, int]:
    return level, 2 if one_dimensional else int(length >= LONG)


def encode(tensors: Sequence[Sequence[Coded]]) -> bytes:
    """Bytes of the components of all tensors, in layout order."""
    components = [component for tensor in tensors for component in tensor]
    symbols: dict[tuple[int, int], list[np.ndarray[tuple[int], np.dtype[np.int64]]]] = {}
    for component in components:
        for vector in (component.right, component.left):
            if vector is not None:
                context = _context(component.level, len(vector), component.right is None)
                symbols.setdefault(context, []).append(vector.numpy().astype(np.int64))
    return coder.encode(
        [
            np.array([len(tensor) for tensor in tensors], dtype=np.int64),
            _differences([component.level for component in components]),
            _differences([component.scale for component in components]),
            *(np.concatenate(symbols[context]) for context in sorted(symbols)),
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

    def delta(self, shape: Shape, device: torch.device) -> Tensor:
        """The offset, float32 of ``shape`` on ``device``."""
        left = self.left.to(device)
        matrix = left if self.right is None else left @ self.right.to(device)
        return matrix.reshape(shape)


def decode(data: bytes, layout: Sequence[tuple[str, Shape]]) -> dict[str, Factors]:
    """Factors by tensor name; tensors without a component are absent.

    Raises ``coder.CorruptOffsets`` when the bytes do not fit the layout.
    """
    most = sum((sum(sides(shape)) + 3) * (min(sides(shape)) or 1) for _, shape in layout) + len(layout)
    sequences = coder.decode(data, max_symbols=most)
    if len(sequences) < 3 or len(sequences[0]) != len(layout):
        raise coder.CorruptOffsets("the offsets describe another set of tensors")
    counts, levels, scales = sequences[0], np.cumsum(sequences[1]), np.cumsum(sequences[2])
    if counts.min(initial=0) < 0 or counts.sum() != len(levels) or len(levels) != len(scales):
        raise coder.CorruptOffsets("the numbers of components disagree")
    if len(levels) and not (levels.min() >= 0 and levels.max() < LEVELS and abs(scales).max() < 1000):
        raise coder.CorruptOffsets("a level or a scale is out of range")
    return _assemble(layout, counts, levels, scales, sequences[3:])


def _assemble(
    layout: Sequence[tuple[str, Shape]],
    counts: coder.Integers,
    levels: coder.Integers,
    scales: coder.Integers,
    symbols: list[coder.Integers],
) -> dict[str, Factors]:
    needed: dict[tuple[int, int], int] = {}
    plan: list[tuple[str, int, int, list[tuple[int, int]]]] = []
    start = 0
    for (name, shape), count in zip(layout, counts, strict=True):
        left, right = sides(shape)
        if count > (min(left, right) if right else 1):
            raise coder.CorruptOffsets(f"{count} components announced for {name} of shape {list(shape)}")
        kept = [(int(levels[i]), int(scales[i])) for i in range(start, start + int(count))]
        start += int(count)
        for level, _ in kept:
            for length in (right, left):
                if length:
                    context = _context(level, length, not right)
                    needed[context] = needed.get(context, 0) + length
        if kept:
            plan.append((name, left, right, kept))
    contexts = sorted(needed)
    if [needed[context] for context in contexts] != [len(sequence) for sequence in symbols]:
        raise coder.CorruptOffsets("the numbers of symbols disagree")
    pools = {context: torch.from_numpy(sequence) for context, sequence in zip(contexts, symbols, strict=True)}
    used = dict.fromkeys(contexts, 0)

    def take(level: int, length: int, one_dimensional: bool) -> Tensor:
        context = _context(level, length, one_dimensional)
        used[context] += length
        return dequantise(pools[context][used[context] - length : used[context]], level)

    factors = {}
    for name, left, right, kept in plan:
        rights, lefts = [], []
        for level, scale in kept:
            if right:
                rights.append(take(level, right, False) / math.sqrt(right))
            lefts.append(take(level, left, not right) * scale_value(scale))
        factors[name] = Factors(torch.stack(lefts, 1), torch.stack(rights) if right else None)
    return factors
