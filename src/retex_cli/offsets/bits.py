"""Floating-point tensors as integers in the order of their values, and integers of a few bits as bytes.

A pattern is split into its sign and its magnitude; ``order`` counts patterns from the most negative to the most
positive one, so neighbouring values have neighbouring integers whatever their exponent. It is one to one: both zeros
and every NaN keep their bits. Everything is int64 inside, for all element types.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Integers = NDArray[np.int64]

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MANTISSA_AND_BIAS = {
    torch.float64: (52, 1023),
    torch.float32: (23, 127),
    torch.float16: (10, 15),
    torch.bfloat16: (7, 127),
    torch.float8_e4m3fn: (3, 7),
    torch.float8_e4m3fnuz: (3, 8),
    torch.float8_e5m2: (2, 15),
    torch.float8_e5m2fnuz: (2, 16),
}
TYPES = tuple(_MANTISSA_AND_BIAS)
"""The element types that are known here."""


@dataclass(frozen=True)
class Grid:
    """The values of an element type whose last ``trailing`` bits are zero: bfloat16 stored as float32 has 16."""

    dtype: torch.dtype
    trailing: int

    @property
    def mantissa(self) -> int:
        """Bits of the mantissa that are in use; negative if the zeros reach into the exponent."""
        return _MANTISSA_AND_BIAS[self.dtype][0] - self.trailing

    @property
    def bias(self) -> int:
        """What is subtracted from a stored exponent."""
        return _MANTISSA_AND_BIAS[self.dtype][1]

    def order(self, tensor: Tensor) -> Integers:
        """int64 of the same shape; a value between two of the grid goes to the nearer one."""
        signed, magnitude = _split(tensor)
        if self.trailing:
            magnitude = (magnitude + (1 << (self.trailing - 1))) >> self.trailing
        return np.where(signed, ~magnitude, magnitude)

    def values(self, order: Integers) -> Tensor:
        """The tensor of these integers; ``order`` undoes it."""
        magnitude = np.where(order < 0, ~order, order) << self.trailing
        width = self.dtype.itemsize
        pattern = np.where(order < 0, magnitude + np.int64(-(1 << (8 * width - 1))), magnitude)
        return torch.from_numpy(pattern.astype(f"i{width}")).view(self.dtype)


def _split(tensor: Tensor) -> tuple[NDArray[np.bool_], Integers]:
    width = tensor.dtype.itemsize
    pattern = tensor.contiguous().view(_INTEGER[width]).numpy().astype(np.int64)
    return pattern < 0, pattern & ((1 << (8 * width - 1)) - 1)


def grid_of(tensor: Tensor) -> Grid:
    """The coarsest grid that holds every value."""
    used = int(np.bitwise_or.reduce(_split(tensor)[1], axis=None, initial=0))
    return Grid(tensor.dtype, (used & -used).bit_length() - 1 if used else 0)


def magnitudes(order: Integers) -> Integers:
    """Distance from the zero of the same sign."""
    return np.where(order < 0, ~order, order)


def pack(values: Integers, bits: int) -> bytes:
    """The low ``bits`` of every value: whole bytes in planes, the rest bit by bit, least significant first."""
    planes = [((values >> (8 * k)) & 255).astype(np.uint8).tobytes() for k in range(bits // 8)]
    rest = bits % 8
    if rest:
        top = ((values >> (8 * (bits // 8))) & ((1 << rest) - 1)).astype(np.uint8)
        spread = (top[:, None] >> np.arange(rest, dtype=np.uint8)) & 1
        planes.append(np.packbits(spread, axis=None, bitorder="little").tobytes())
    return b"".join(planes)


def packed_bytes(count: int, bits: int) -> int:
    """The length of what ``pack`` makes of ``count`` values."""
    return count * (bits // 8) + (count * (bits % 8) + 7) // 8


def unpack(data: bytes, count: int, bits: int) -> Integers:
    """The inverse of ``pack``: int64 [count], each below ``2 ** bits``. ``data`` is exactly ``packed_bytes`` long."""
    values = np.zeros(count, dtype=np.int64)
    for k in range(bits // 8):
        plane = np.frombuffer(data, np.uint8, count, k * count)
        values |= plane.astype(np.int64) << (8 * k)
    rest = bits % 8
    if rest:
        whole = count * (bits // 8)
        spread = np.unpackbits(np.frombuffer(data, np.uint8, -1, whole), count=count * rest, bitorder="little")
        weights = (1 << np.arange(rest)).astype(np.uint8)
        top = (spread.reshape(count, rest) * weights).sum(1, dtype=np.int64)
        values |= top << (8 * (bits // 8))
    return values
