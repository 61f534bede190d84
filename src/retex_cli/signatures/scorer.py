"""The stored tasks made ready to score inputs: float32 products of a batch with a few matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from retex_cli.signatures import gaussian, residual
from retex_cli.signatures.scatter import Scatter, floored, pooled_variance

OWN_RIDGE = 0.5
"""Shrinkage of a task's own covariance where an input's strangeness is measured; 0.1 to 0.9 made no difference."""

CHUNK = 4096
"""Inputs scored at once: bounds the memory."""


@dataclass(frozen=True, slots=True)
class Frame:
    """The tasks' covariances in float64, about ``origin`` [D] and, where that is far smaller, in the span of all means
    and bases: ``span`` [D, k] has orthonormal columns, and outside it every covariance is the ridge alone."""

    origin: torch.Tensor
    span: torch.Tensor | None
    weights: gaussian.Weights
    white: gaussian.Whitened

    def into(self, deviations: torch.Tensor) -> torch.Tensor:
        """Deviations [m, D] that lie in the span, whitened."""
        return self.white.into(deviations if self.span is None else deviations @ self.span)

    def functionals(self, rows: torch.Tensor) -> torch.Tensor:
        """Float32 rows [m, D] that do to an input's deviation from the origin what ``rows`` do to it whitened."""
        back = self.white.back(rows)
        return (back if self.span is None else back @ self.span.T).float().contiguous()


def frame(parts: Sequence[Scatter], shrinkage: float, own: float) -> Frame:
    """Pools the tasks' scatter; what the bases leave out is pooled into the ridge."""
    counts = [part.count for part in parts]
    weights = gaussian.weights(counts, pooled_variance(parts), shrinkage, own)
    rest = sum(part.count * part.residual for part in parts) / sum(counts)
    weights = gaussian.Weights(weights.ridge + (1 - shrinkage) * rest, weights.pooled, weights.own)
    means = torch.stack([part.mean for part in parts])
    origin = means.mean(0)
    means = means - origin
    factors = [part.factor * part.count**0.5 for part in parts]
    span = None
    stacked = torch.cat([means, *factors])
    if len(stacked) <= means.shape[1] // 2:
        span = torch.linalg.qr(stacked.T).Q
        means, factors = means @ span, [factor @ span for factor in factors]
    return Frame(origin, span, weights, gaussian.whiten(means, factors, weights))


@dataclass(frozen=True, slots=True)
class GaussianScorer:
    """The discriminant up to ``(x - origin)^T A^-1 (x - origin)``, A the shared part, which is one number per input.

    Left is, per task s with deviations d = x - origin, ``offsets[s] - linear[s] d - || rows_s d - shifts_s ||^2``:
    one product of a batch with ``functionals`` [T + sum r_s, D], the linear rows first.
    """

    origin: torch.Tensor
    functionals: torch.Tensor
    offsets: torch.Tensor
    shifts: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, parts: Sequence[Scatter], shrinkage: float, own: float) -> GaussianScorer:
        """See ``frame``."""
        made = frame(parts, shrinkage, own)
        white = made.white
        functionals = made.functionals(torch.cat([2 * white.means, *white.own]))
        offsets = (white.means * white.means).sum(1) + white.log_det
        shifts = tuple((own @ mean).float() for own, mean in zip(white.own, white.means, strict=True))
        return cls(made.origin.float(), functionals, (offsets - offsets.mean()).float(), shifts)

    def scores(self, rows: torch.Tensor) -> torch.Tensor:
        """``[m, T]`` of float32 ``rows`` [m, D]."""
        return torch.cat([self._scores(part) for part in torch.split(rows, CHUNK)])

    def _scores(self, rows: torch.Tensor) -> torch.Tensor:
        products = (rows - self.origin) @ self.functionals.T
        linear, *own = torch.split(products, [len(self.offsets), *map(len, self.shifts)], 1)
        inside = [(part - shift).square().sum(1) for part, shift in zip(own, self.shifts, strict=True)]
        return self.offsets - linear - torch.stack(inside, 1)


@dataclass(frozen=True, slots=True)
class ResidualScorer:
    """``means`` [T, D] and the orthonormal rows of every task's subspace."""

    means: torch.Tensor
    bases: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, parts: Sequence[Scatter]) -> ResidualScorer:
        """Subspaces as they are."""
        return cls(torch.stack([part.mean for part in parts]).float(), tuple(part.basis.float() for part in parts))

    def scores(self, rows: torch.Tensor) -> torch.Tensor:
        """``[m, T]`` of float32 ``rows`` [m, D]."""
        return residual.distances(rows, self.means, self.bases)


@dataclass(frozen=True, slots=True)
class OwnDistance:
    """How far an input is from one task by that task's own covariance alone, whatever other tasks there are.

    ``(||d||^2 - ||rows d||^2) / ridge``, d the deviation from ``mean``: a Mahalanobis distance.
    """

    mean: torch.Tensor
    rows: torch.Tensor
    ridge: float

    @classmethod
    def of(cls, part: Scatter) -> OwnDistance:
        """With ``OWN_RIDGE`` of the task's own mean variance."""
        ridge = own_ridge(part) + (1 - OWN_RIDGE) * part.residual
        factor = part.factor
        inner = factor @ factor.T
        inner.diagonal().add_(ridge / (1 - OWN_RIDGE))
        rows = torch.linalg.solve_triangular(torch.linalg.cholesky(inner), factor, upper=False)
        return cls(part.mean.float(), rows.float(), ridge)

    def of_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """``[m]`` for float32 ``rows`` [m, D]."""
        away = rows - self.mean
        inside = away @ self.rows.T
        return ((away * away).sum(1) - (inside * inside).sum(1)).clamp(min=0) / self.ridge


def own_ridge(part: Scatter) -> float:
    """Ridge of a task's own covariance without what its basis leaves."""
    size = part.mean.shape[0]
    return OWN_RIDGE * floored(part.total / size, float((part.mean**2).sum()) / size)


def own_left_out(rows: torch.Tensor, part: Scatter) -> torch.Tensor:
    """``OwnDistance`` [n] of each of the task's float64 reference ``rows`` [n, D] under the covariance without it."""
    count = len(rows)
    ridge = own_ridge(part)
    deviations = rows - part.mean
    inner = deviations @ deviations.T
    squares = inner.diagonal().clone()
    weight = (1 - OWN_RIDGE) / count
    lifted = inner * weight
    lifted.diagonal().add_(ridge)
    inside = (inner * torch.linalg.solve(lifted, inner)).sum(0) * weight
    height = ((squares - inside) / ridge).clamp(min=0)
    stretch = count / (count - 1)
    distance: torch.Tensor = stretch * stretch * height / (1 - weight * stretch * height)
    return distance
