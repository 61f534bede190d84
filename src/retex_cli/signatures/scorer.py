"""The stored tasks made ready to score inputs: float32 products of a batch with a few matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from retex_cli.signatures import gaussian, residual
from retex_cli.signatures.folds import left_out
from retex_cli.signatures.scatter import Scatter, floored, pooled_variance, scatter

OWN_RIDGE = 0.5
"""Shrinkage of a task's own covariance where an input's strangeness is measured; 0.1 to 0.9 made no difference."""

OWN_DIRECTIONS = 64
"""Of a task's own covariance that is looked at: all of them cost four times as much at 256 reference inputs."""

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

    Left is, per task s with deviations d = x - origin, ``offsets[s] - linear[s] d - || rows_s d - shifts_s ||^2``: one
    product of a batch with ``functionals`` [T (1 + r), D], the linear rows first. Of a task's own directions the r
    that matter most are looked at, padded with zeros where it has fewer; the others count as for a mean input.
    """

    functionals: torch.Tensor
    constants: torch.Tensor
    tasks: int

    @classmethod
    def of(cls, parts: Sequence[Scatter], shrinkage: float, own: float) -> GaussianScorer:
        """See ``frame``."""
        made = frame(parts, shrinkage, own)
        white = made.white
        kept = [_leading(rows) for rows in white.own]
        rest = [(rows * rows).sum() - (few * few).sum() for rows, few in zip(white.own, kept, strict=True)]
        offsets = (white.means * white.means).sum(1) + white.log_det - torch.stack(rest)
        rank = max(map(len, kept))
        padded = [torch.nn.functional.pad(rows, (0, 0, 0, rank - len(rows))) for rows in kept]
        shifts = torch.cat([rows @ mean for rows, mean in zip(padded, white.means, strict=True)])
        functionals = made.functionals(torch.cat([2 * white.means, *padded]))
        constants = torch.cat([offsets.mean() - offsets, -shifts]) - functionals.double() @ made.origin
        return cls(functionals, constants.float(), len(parts))

    def scores(self, rows: torch.Tensor) -> torch.Tensor:
        """``[m, T]`` of float32 ``rows`` [m, D]."""
        if len(rows) <= CHUNK:
            return self._scores(rows)
        return torch.cat([self._scores(part) for part in torch.split(rows, CHUNK)])

    def _scores(self, rows: torch.Tensor) -> torch.Tensor:
        products = torch.addmm(self.constants, rows, self.functionals.T)
        own = len(self.functionals) // self.tasks - 1
        inside = products[:, self.tasks :].view(len(rows), self.tasks, own).square().sum(2)
        return inside.add_(products[:, : self.tasks]).neg_()


def _leading(rows: torch.Tensor) -> torch.Tensor:
    """At most ``OWN_DIRECTIONS`` orthogonal rows [r, k] with nearly the Gram matrix ``rows^T rows`` of [n, k]."""
    if len(rows) <= OWN_DIRECTIONS:
        return rows
    vectors = torch.linalg.eigh(rows @ rows.T).eigenvectors
    leading: torch.Tensor = vectors[:, -OWN_DIRECTIONS:].T @ rows
    return leading


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
        """With ``OWN_RIDGE`` of the task's own mean variance, and its ``OWN_DIRECTIONS``."""
        part = part.leading(OWN_DIRECTIONS)
        size = part.mean.shape[0]
        ridge = OWN_RIDGE * floored(part.total / size, float((part.mean**2).sum()) / size)
        ridge += (1 - OWN_RIDGE) * part.residual
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


def own_left_out(rows: torch.Tensor) -> torch.Tensor:
    """``OwnDistance`` [n] of each of a task's float64 reference ``rows`` [n, D] from the task without its fold."""
    return left_out(rows, lambda rest, held: OwnDistance.of(scatter(rest)).of_rows(held.float()).double())
