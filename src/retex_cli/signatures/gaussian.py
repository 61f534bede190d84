"""Scores of a regularised quadratic discriminant, and exact leave-one-out without refitting.

Task s has the covariance

    A_s = rho I + p * sum_t n_t S_t + w_s n_s S_s,     n_t S_t = sum over inputs of (x - m_t)(x - m_t)^T,
    rho = l v,   p = (1 - l)(1 - g) / N,   w_s = (1 - l) g / n_s,

where v is the mean pooled variance, N the number of all inputs, l the ``shrinkage`` toward a scaled identity, and g the
``own`` share of a task's own scatter beside the pooled one (regularised discriminant analysis: Friedman, JASA 84(405),
1989). g = 0 is the pooled-covariance Mahalanobis distance of arXiv 1807.03888. The score of an input x is

    (x - m_s)^T A_s^-1 (x - m_s) + log det A_s,

twice the negative log-likelihood up to a constant shared by all tasks; smaller is closer.

Leaving out input i of task t, with c = x_i - m_t, moves m_t by -c / (n_t - 1) and takes n_t / (n_t - 1) c c^T from the
scatter: a rank-one downdate (Sherman-Morrison) of every A_s at fixed rho, p and w.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Weights:
    """The numbers rho, p and w_s of the module's formula."""

    ridge: float
    pooled: float
    own: tuple[float, ...]


def weights(counts: Sequence[int], variance: float, shrinkage: float, own: float) -> Weights:
    """From ``shrinkage`` and ``own`` share (0..1 both) to the weights of sums of squares."""
    kept = 1.0 - shrinkage
    return Weights(
        ridge=shrinkage * variance,
        pooled=kept * (1.0 - own) / sum(counts),
        own=tuple(kept * own / count for count in counts),
    )


@dataclass(frozen=True, slots=True)
class Whitened:
    """Everything in coordinates where the shared part ``rho I + p sum n_t S_t = lower lower^T`` is the identity.

    ``means`` [T, k]; ``factors`` the given factors; ``own`` per task rows R_s [r_s, k] with A_s^-1 = I - R_s^T R_s;
    ``log_det`` [T] leaves out ``D log rho``, the same for all tasks.
    """

    lower: torch.Tensor
    means: torch.Tensor
    factors: tuple[torch.Tensor, ...]
    own: tuple[torch.Tensor, ...]
    log_det: torch.Tensor

    def into(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows`` [m, k] in these coordinates."""
        white: torch.Tensor = torch.linalg.solve_triangular(self.lower, rows.T, upper=False).T
        return white

    def back(self, rows: torch.Tensor) -> torch.Tensor:
        """Functionals [m, k] of these coordinates as functionals of the original ones."""
        original: torch.Tensor = torch.linalg.solve_triangular(self.lower.T, rows.T, upper=True).T
        return original


def whiten(
    means: torch.Tensor, factors: Sequence[torch.Tensor], weights: Weights, gram: torch.Tensor | None = None
) -> Whitened:
    """``means`` [T, k]; ``factors``: per task rows F [r, k] with F^T F = n_t S_t; ``gram``: their sum. All float64."""
    width = means.shape[1]
    stacked = torch.cat(list(factors))
    shared = (stacked.T @ stacked if gram is None else gram) * weights.pooled
    shared.diagonal().add_(weights.ridge)
    lower = torch.linalg.cholesky(shared)
    base = 2 * lower.diagonal().log().sum() - width * math.log(weights.ridge)
    solved = torch.linalg.solve_triangular(lower, torch.cat([means, stacked]).T, upper=False).T.contiguous()
    whitened = solved[len(means) :].split([len(factor) for factor in factors])
    rows, log_det = [], []
    for white, weight in zip(whitened, weights.own, strict=True):
        if weight == 0.0 or len(white) == 0:
            rows.append(white[:0])
            log_det.append(base)
            continue
        inner = white @ white.T
        inner.diagonal().add_(1.0 / weight)
        root = torch.linalg.cholesky(inner)
        rows.append(torch.linalg.solve_triangular(root, white, upper=False))
        log_det.append(base + 2 * root.diagonal().log().sum() + len(white) * math.log(weight))
    return Whitened(lower, solved[: len(means)], whitened, tuple(rows), torch.stack(log_det))


def distances(white: Whitened, rows: torch.Tensor) -> torch.Tensor:
    """Scores ``[m, T]`` of already whitened ``rows`` [m, k]."""
    columns = []
    for mean, own, log_det in zip(white.means, white.own, white.log_det, strict=True):
        away = rows - mean
        columns.append((away * away).sum(1) - ((away @ own.T) ** 2).sum(1) + log_det)
    return torch.stack(columns, 1)


def leave_one_out(white: Whitened, weights: Weights, task: int, deviations: torch.Tensor) -> torch.Tensor:
    """Scores ``[n, T]`` of one task's own inputs, each under the signatures that lack it.

    ``deviations``: whitened ``x_i - m_task`` [n >= 2, k] of all n inputs that made the task's mean and factor. Equal
    to n refits at the same weights. Tensors are float64.
    """
    count = len(deviations)
    stretch = count / (count - 1)
    squares = (deviations * deviations).sum(1)
    scores = []
    for other, (mean, own, log_det) in enumerate(zip(white.means, white.own, white.log_det, strict=True)):
        deviation_own = deviations @ own.T
        height = squares - (deviation_own * deviation_own).sum(1)
        if other == task:
            left = 1.0 - (weights.pooled + weights.own[task]) * stretch * height
            distance = stretch * stretch * height / left
        else:
            shift = white.means[task] - mean  # x - m_s = deviation + shift
            shift_own = own @ shift
            along = deviations @ shift - deviation_own @ shift_own
            beta = weights.pooled * stretch
            left = 1.0 - beta * height
            distance = height + 2 * along + shift @ shift - shift_own @ shift_own
            distance = distance + beta * (height + along) ** 2 / left
        scores.append(distance + log_det + left.log())  # left > 0: the ridge keeps A_s definite after the downdate
    return torch.stack(scores, 1)


def leave_each_out(rows: Sequence[torch.Tensor], weights: Weights, gram: torch.Tensor | None = None) -> torch.Tensor:
    """Scores ``[N, T]`` of every reference input without itself; ``rows``: per task [n_t, k], one after another.

    ``gram`` [k, k], the sum of the tasks' scatter matrices, saves computing it again.
    """
    means, centred = centre(rows)
    white = whiten(means, centred, weights, gram)
    return torch.cat([leave_one_out(white, weights, task, part) for task, part in enumerate(white.factors)])


def centre(rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Means [T, k] of the tasks' ``rows``, and the rows without them."""
    means = torch.stack([part.mean(0) for part in rows])
    return means, [part - mean for part, mean in zip(rows, means, strict=True)]


def compact(rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same inner products in at most N coordinates: ``rows`` themselves, or a factor of their Gram matrix."""
    stacked = torch.cat(list(rows))
    count, width = stacked.shape
    if width <= count:
        return list(rows)
    energy = float((stacked * stacked).sum()) / count
    stacked = stacked - stacked.mean(0)
    gram = stacked @ stacked.T
    gram.diagonal().add_(max(1e-12 * float(gram.diagonal().mean()), 1e-18 * energy, 1e-30))  # inputs may repeat
    return list(torch.linalg.cholesky(gram).split([len(part) for part in rows]))
