"""The scalar quantiser of the offsets: a ladder of uniform mid-tread steps with centroid reconstruction.

Vectors are scaled to unit variance first. Level ``l`` rounds to multiples of ``STEPS[l] = 2 ** (1 - l / 2)``; a symbol
is decoded to the mean of a unit normal inside its cell, so no level ever leaves more error than dropping the vector (a
mid-tread quantiser that decodes to cell middles does, under about 0.8 bits). Singular vectors of real offsets follow
the normal rate to two decimals, so rate and distortion are tabulated for it once.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

LEVELS = 20
STEPS = tuple(2.0 ** (1 - level / 2) for level in range(LEVELS))


def _normal_density(x: float) -> float:
    return math.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _normal_tail(x: float) -> float:
    """P(z > x); keeps its relative precision far out, where a difference of cumulative values has none."""
    return 0.5 * math.erfc(x / math.sqrt(2))


def _characterise(step: float) -> tuple[float, float, list[float]]:
    """Bits per entry, mean squared error per entry, and the decoded values of symbols 0, 1, 2, … for a unit normal."""
    centre = 1 - 2 * _normal_tail(step / 2)
    rate, kept, values = -centre * math.log2(centre), 0.0, [0.0]
    while True:
        low, high = (len(values) - 0.5) * step, (len(values) + 0.5) * step
        mass = _normal_tail(low) - _normal_tail(high)
        if mass < 1e-15:
            break
        centroid = (_normal_density(low) - _normal_density(high)) / mass
        values.append(centroid)
        rate -= 2 * mass * math.log2(mass)
        kept += 2 * mass * centroid * centroid
    return rate, 1 - kept, values


_CHARACTERS = [_characterise(step) for step in STEPS]
RATES = np.array([rate for rate, _, _ in _CHARACTERS])
"""Bits per entry of each level."""
DISTORTIONS = np.array([error for _, error, _ in _CHARACTERS])
"""Mean squared error per unit-variance entry of each level."""
_VALUES = [torch.tensor(values, dtype=torch.float32) for _, _, values in _CHARACTERS]


def quantise(x: Tensor, level: int) -> Tensor:
    """Symbols (int32) of unit-variance entries ``x`` (float32, any shape)."""
    return torch.round(x / STEPS[level]).to(torch.int32)


def dequantise(symbols: Tensor, level: int) -> Tensor:
    """Decoded entries (float32) of ``symbols`` (integer, any shape): cell centroids, cell middles past the table."""
    values = _VALUES[level]
    magnitude = symbols.abs()
    inside = values[magnitude.clamp(max=len(values) - 1).long()]
    decoded = torch.where(magnitude < len(values), inside, magnitude * STEPS[level])
    return decoded * symbols.sign()
