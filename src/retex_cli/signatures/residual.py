"""The published identifier: distance to a task's subspace (arXiv 2606.26902, as computed in arXiv 2606.22589).

Per task, centre the reference rows, keep the top r right singular vectors V; the score of an input f is
``|| (I - V V^T)(f - mean) ||``, smaller is closer, with ``r = min(max(1, round(0.1 D)), n - 1)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from retex_cli.signatures import folds
from retex_cli.signatures.scatter import scatter

SHARE = 0.1
"""Directions kept, as a share of the dimensions (published)."""


def rank_of(size: int, count: int) -> int:
    """Directions kept for ``count`` inputs of ``size`` dimensions."""
    return min(max(1, round(SHARE * size)), count - 1)


def distances(rows: torch.Tensor, means: torch.Tensor, bases: Sequence[torch.Tensor]) -> torch.Tensor:
    """Scores ``[m, T]`` of ``rows`` [m, D]; ``bases``: per task orthonormal rows [r, D]."""
    columns = []
    for mean, basis in zip(means, bases, strict=True):
        away = rows - mean
        inside = away @ basis.T
        columns.append(((away * away).sum(1) - (inside * inside).sum(1)).clamp(min=0).sqrt())
    return torch.stack(columns, 1)


def subspace(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [D] and kept directions [r, D] of one task's ``rows`` [n >= 2, D]; fewer where inputs repeat."""
    found = scatter(rows, rank_of(rows.shape[1], len(rows)))
    return found.mean, found.basis


def left_out(rows: torch.Tensor) -> torch.Tensor:
    """Score ``[n]`` of each of one task's inputs under a subspace fitted without its fold (without itself, n <= 64)."""

    def judge(rest: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        mean, basis = subspace(rest) if len(rest) > 1 else (rest.mean(0), rest[:0])
        return distances(held, mean[None], [basis])[:, 0]

    return folds.left_out(rows, judge)


def leave_each_out(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Scores ``[N, T]`` of every reference input: its own task's without its fold, the others' as they are."""
    found = [subspace(part) for part in rows]
    scores = distances(torch.cat(list(rows)), torch.stack([mean for mean, _ in found]), [basis for _, basis in found])
    start = 0
    for task, part in enumerate(rows):
        scores[start : start + len(part), task] = left_out(part)
        start += len(part)
    return scores
