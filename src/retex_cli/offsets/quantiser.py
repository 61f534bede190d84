"""The scalar quantiser of the offsets: a ladder of uniform mid-tread steps, decoded to where entries really lie.

Vectors are scaled to unit variance first. Level ``l`` rounds to multiples of ``2 ** (2 - l / 2)``. A symbol is decoded
to the mean of the entries that were rounded to it, so no level ever leaves more error than dropping the vector (a
mid-tread quantiser that decodes to cell middles does, under about 0.8 bits). Singular vectors of most offsets follow
the normal rate to two decimals, so rate and distortion are tabulated for it once; embedding tables, of whose rows only
a few have moved, cost a fraction of that and are measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LEVELS = 24
"""Levels that an allocation may choose; the shorter vector of a component may lie beyond them."""
SHIFTS = 3
"""Magnitudes 1, 2 and 3 or more each have their own distance from the cell's middle to its mean."""
SHIFT_UNIT = 64
_FINE = 14
"""From this level on a cell is so small that a normal density is flat in it."""


def step(level: int) -> float:
    """Distance of neighbouring values, for entries of unit variance."""
    return math.pow(2.0, 2 - level / 2)


@dataclass(frozen=True)
class Curve:
    """What each level costs and leaves for one kind of vectors, per entry of unit variance.

    ``rates`` in bits, ``distortions`` as mean squared error; float64, indexed by level.
    """

    rates: NDArray[np.float64]
    distortions: NDArray[np.float64]


def _tail(x: float) -> float:
    """P(z > x) of a unit normal; keeps its relative precision far out, where a difference has none."""
    return 0.5 * math.erfc(x / math.sqrt(2))


def _density(x: float) -> float:
    return math.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _normal_level(level: int) -> tuple[float, float]:
    width = step(level)
    if level >= _FINE:
        return 0.5 * math.log2(2 * math.pi * math.e) - math.log2(width), width * width / 12
    centre = 1 - 2 * _tail(width / 2)
    rate, kept, symbol = -centre * math.log2(centre), 0.0, 1
    while (mass := _tail((symbol - 0.5) * width) - _tail((symbol + 0.5) * width)) > 1e-15:
        mean = (_density((symbol - 0.5) * width) - _density((symbol + 0.5) * width)) / mass
        rate -= 2 * mass * math.log2(mass)
        kept += 2 * mass * mean * mean
        symbol += 1
    return rate, 1 - kept


def _normal_curve(levels: int) -> Curve:
    points = np.array([_normal_level(level) for level in range(levels)])
    return Curve(points[:, 0], points[:, 1])


NORMAL = _normal_curve(2 * LEVELS)
"""The curve of normal entries."""


def measure(vectors: Tensor) -> Curve:
    """The curve of the entries of ``vectors`` (float32 [k, n], rows of unit variance), as coded with a table of their
    own; levels at which nearly every entry has a symbol to itself are taken from the normal curve."""
    rates, distortions = NORMAL.rates[:LEVELS].copy(), NORMAL.distortions[:LEVELS].copy()
    for level in range(_FINE):
        symbols = quantise(vectors, level)
        counts = torch.bincount((symbols - symbols.min()).flatten())
        share = counts[counts > 0] / symbols.numel()
        rates[level] = -float((share * share.log2()).sum())
        decoded = dequantise(symbols, level, centroid_shifts(vectors, symbols, level))
        distortions[level] = min(1.0, float((vectors - decoded).square().mean()))
    return Curve(rates, np.minimum.accumulate(distortions))


def quantise(x: Tensor, level: int) -> Tensor:
    """Symbols (int32) of unit-variance entries ``x`` (float32, any shape)."""
    return torch.round(x / step(level)).to(torch.int32)


def centroid_shifts(x: Tensor, symbols: Tensor, level: int) -> list[int]:
    """How far, in 64ths of a step, the mean of the entries of each magnitude lies below the middle of its cell."""
    below = symbols.abs() - x.abs() / step(level)
    magnitude = symbols.abs().clamp(max=SHIFTS).flatten().long()
    counts = torch.bincount(magnitude, minlength=SHIFTS + 1).clamp_min(1)
    sums = torch.bincount(magnitude, weights=below.flatten().double(), minlength=SHIFTS + 1)
    return [round(SHIFT_UNIT * value) for value in (sums / counts)[1:].tolist()]


def dequantise(symbols: Tensor, level: int, shifts: list[int]) -> Tensor:
    """Decoded entries (float32) of ``symbols`` (integer, any shape)."""
    if not symbols.numel():
        return torch.zeros(symbols.shape)
    values = torch.empty(symbols.shape)
    Levels(symbols.flatten(), level, shifts).take(0, values.view(-1))
    return values


class Levels:
    """Coded symbols (integer, one-dimensional) of one level and their shifts, decoded when they are needed."""

    def __init__(self, symbols: Tensor, level: int, shifts: list[int]) -> None:
        self._symbols, self._level, self._shifts = symbols, level, shifts
        found = symbols.numpy()  # whose extremes take a tenth of the time of torch's
        self._low, high = int(found.min(initial=0)), int(found.max(initial=0))
        few = high - self._low < len(symbols)
        self._table = _values(torch.arange(self._low, high + 1), level, shifts) if few else None
        small = self._low >= -1 and high <= 1
        self._one = float(_values(torch.ones(1), level, shifts)) if small else None

    def take(self, start: int, out: Tensor) -> None:
        """Entries from ``start`` on into ``out``, float32 and flat."""
        symbols = self._symbols[start : start + len(out)]
        if self._one is not None:
            torch.mul(symbols, self._one, out=out)  # which is what most entries of most files are
        elif self._table is not None:
            wide = symbols if symbols.dtype == torch.int64 else symbols.to(torch.int32)
            torch.index_select(self._table, 0, wide - self._low, out=out)  # a look-up is all it takes for many entries
        else:
            out.copy_(_values(symbols.long(), self._level, self._shifts))


def _values(symbols: Tensor, level: int, shifts: list[int]) -> Tensor:
    below = torch.tensor([0.0, *shifts], dtype=torch.float32) / SHIFT_UNIT
    magnitude = symbols.abs()
    return symbols.sign() * (magnitude - below[magnitude.clamp(max=SHIFTS).long()]) * step(level)


def dequantised(x: Tensor, steps: Tensor, shifts: Tensor) -> Tensor:
    """What unit-variance vectors ``x`` (float32 [k, n]) become, each at its own step [k, 1]; ``shifts`` [k, SHIFTS + 1]
    in steps, the first of them zero."""
    symbols = torch.round(x / steps)
    magnitude = symbols.abs()
    below = shifts.gather(1, magnitude.clamp(max=SHIFTS).long())
    return symbols.sign() * (magnitude - below) * steps
