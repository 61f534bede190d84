"""Predictions that have the same bits on every machine, for corrections that are added to them.

A matrix product in floating point depends on the order of its sums, and that on the processor, the library and the
number of threads. Here the factors are rounded to integers so small that every partial sum of their product is an
integer below 2^53: float64 holds all of them exactly, so the order does not matter. What remains is one addition and
one rounding for each entry, which IEEE 754 defines to the bit.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from retex_cli.offsets.domain import is_variance
from retex_cli.offsets.stream import Factors

_EXACT = 53
"""Integers up to this power of two are exact in float64."""


class Prediction:
    """``merged`` plus a task's offset, row by row, rounded to the expert's element type.

    ``merged``: any shape, any floating-point type; ``factors`` None where the task has no offset.
    """

    def __init__(self, merged: Tensor, factors: Factors | None, dtype: torch.dtype) -> None:
        self._merged = merged.flatten(1) if merged.ndim >= 2 else merged.reshape(1, -1)
        self._first = 0
        self._dtype = dtype
        self.has_offset = factors is not None
        self._factors = _integers(factors) if factors else None

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns): ``d_out x rest``; vectors and scalars are one row."""
        return self._merged.shape[0], self._merged.shape[1]

    def over(self, rows: Tensor, first: int) -> Prediction:
        """The same of some rows alone: [n, columns] of a merged tensor, the first of which is its row ``first``."""
        other = copy.copy(self)
        other._merged, other._first = rows, first
        return other

    def plain(self, start: int, stop: int) -> Tensor:
        """Rows of the merged tensor alone."""
        return self._rounded(self._merged[start - self._first : stop - self._first].double())

    def offset(self, start: int, stop: int) -> Tensor:
        """Rows of the merged tensor with the offset added."""
        merged = self._merged[start - self._first : stop - self._first].double()
        if self._factors is None:
            return self._rounded(merged)
        left, right, unit = self._factors
        delta = left if right is None else (left[start:stop] @ right) * unit  # a vector is one row
        return self._rounded(merged + delta)

    def _rounded(self, value: Tensor) -> Tensor:
        return value if self._dtype == torch.float64 else value.float().to(self._dtype)


def prediction(name: str, merged: Tensor, factors: Factors | None, dtype: torch.dtype) -> Prediction:
    """What the tensor ``name`` is predicted by. Variances are predicted by the merged ones alone: the logarithm in
    which their offsets are added has no defined last bit."""
    return Prediction(merged, None if is_variance(name) else factors, dtype)


def _integers(factors: Factors) -> tuple[Tensor, Tensor | None, float]:
    """Integer factors (float64) and the power of two that their product is to be multiplied by."""
    if factors.right is None:
        return factors.left.double().reshape(1, -1), None, 1.0
    bits = _EXACT - math.ceil(math.log2(max(factors.left.shape[1], 1)))
    left, left_scale = _rounded_to(factors.left, bits // 2)
    right, right_scale = _rounded_to(factors.right, bits - bits // 2)
    return left, right, left_scale * right_scale


def _rounded_to(values: Tensor, bits: int) -> tuple[Tensor, float]:
    """``values`` as integers of at most ``2 ** bits`` and the power of two that they stand in units of."""
    largest = float(values.abs().max()) if values.numel() else 0.0
    unit = math.ldexp(1.0, math.frexp(largest)[1] - bits)
    return torch.round(values.double() / unit), unit
