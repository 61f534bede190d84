"""One task in numbers: how many inputs, their mean, and their scatter about it in factored form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

MAX_RANK = 256
"""Directions kept per task; more reference inputs than that leave the rest as one average variance."""

NUMERICAL_RANK = 1e-10
"""Variances below this share of the largest are rounding, not directions: duplicated inputs have many."""


@dataclass(frozen=True, slots=True)
class Scatter:
    """Covariance ``basis^T diag(spectrum) basis + residual * (what the basis leaves)`` about ``mean``.

    ``count`` inputs of size D; ``mean`` [D], ``basis`` [r, D] with orthonormal rows, ``spectrum`` [r] descending
    (variances, divided by the count), ``residual`` the variance per remaining dimension.
    """

    count: int
    mean: torch.Tensor
    basis: torch.Tensor
    spectrum: torch.Tensor
    residual: float

    @property
    def factor(self) -> torch.Tensor:
        """``[r, D]`` rows whose Gram matrix ``factor^T factor`` is the kept covariance."""
        return self.basis * self.spectrum.sqrt()[:, None]

    @property
    def total(self) -> float:
        """Trace of the covariance."""
        rank, size = self.basis.shape
        return float(self.spectrum.sum()) + self.residual * (size - rank)

    def leading(self, rank: int) -> Scatter:
        """With ``rank`` directions at most; what the others hold is spread evenly, so that the trace stays."""
        size = self.mean.shape[0]
        if len(self.basis) <= rank:
            return self
        left = float(self.spectrum[rank:].sum()) + self.residual * (size - len(self.basis))
        return Scatter(self.count, self.mean, self.basis[:rank], self.spectrum[:rank], left / (size - rank))


def scatter(rows: torch.Tensor, max_rank: int = MAX_RANK) -> Scatter:
    """Scatter of float64 ``rows`` [n >= 2, D]: at most n - 1 directions, since the mean takes one.

    Through the n x n Gram matrix, as n is far below D where it costs anything.
    """
    count, size = rows.shape
    mean = rows.mean(0)
    centred = rows - mean
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    noise = NUMERICAL_RANK * max(float(values[0]), float((rows * rows).sum()) * torch.finfo(rows.dtype).eps)
    rank = min(int((values > noise).sum()), count - 1, size, max_rank)
    kept = values[:rank]
    basis = (vectors[:, :rank] / kept.sqrt()).T @ centred
    left = float((values[rank:].sum() / count).clamp(min=0)) if rank == max_rank else 0.0
    residual = left / (size - rank) if size > rank else 0.0
    return Scatter(count, mean, basis, kept / count, residual)


def pooled_variance(parts: Sequence[Scatter]) -> float:
    """Mean variance of one dimension within tasks, pooled over tasks by their counts, floored by ``floored``."""
    size = parts[0].mean.shape[0]
    within = sum(part.count * part.total for part in parts) / (sum(part.count for part in parts) * size)
    return floored(within, sum(float((part.mean.double() ** 2).sum()) for part in parts) / (len(parts) * size))


def floored(variance: float, energy: float) -> float:
    """``variance``, or where all inputs of a task are alike, a millionth of the ``energy`` of the means."""
    return max(variance, 1e-6 * energy, 1e-30)
