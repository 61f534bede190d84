"""One more task beside stored ones, from its own inputs alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from retex_cli.signatures import gaussian, residual, scorer, storage
from retex_cli.signatures.calibrate import entropy
from retex_cli.signatures.recipe import Recipe
from retex_cli.signatures.scatter import MAX_RANK, Scatter, scatter
from retex_cli.signatures.storage import StoredTask
from retex_cli.signatures.strangeness import Strangeness, calibration, own_left_out


def scatter_of(recipe: Recipe, rows: torch.Tensor) -> Scatter:
    """Scatter of one task's float64 ``rows`` [n, D] with as many directions as the recipe's score uses."""
    rank = residual.rank_of(rows.shape[1], len(rows)) if recipe.score == "residual" else MAX_RANK
    return scatter(rows, rank)


def store(recipe: Recipe, part: Scatter, numbers: torch.Tensor) -> StoredTask:
    """Rounded as the recipe's score allows."""
    return storage.store(part, numbers, small=recipe.score != "residual")


def left_out_scores(recipe: Recipe, rows: torch.Tensor, others: Sequence[Scatter]) -> torch.Tensor:
    """Scores ``[n, T + 1]`` of a newcomer's float64 ``rows`` [n, D], each left out of its own task, the last."""
    if recipe.score == "residual":
        parts = [*others, scatter_of(recipe, rows)]
        scores = residual.distances(rows, torch.stack([p.mean for p in parts]), [p.basis for p in parts])
        scores[:, -1] = residual.left_out(rows)
        return scores
    mine = scatter(rows, len(rows))
    frame = scorer.frame([*others, mine], recipe.shrinkage, recipe.own)
    return gaussian.leave_one_out(frame.white, frame.weights, len(others), frame.into(rows - mine.mean))


def join(
    recipe: Recipe, rows: torch.Tensor, scores: torch.Tensor, others: Sequence[StoredTask]
) -> tuple[StoredTask, float]:
    """The newcomer's arrays, and the share of its inputs that are recognised when left out.

    ``rows`` [n, D] float64, ``scores`` as ``left_out_scores`` gives them. The others are only read.
    """
    part = scatter_of(recipe, rows)
    own = own_left_out(recipe, rows, scores[:, -1])
    mine = torch.stack([own, entropy(scores, recipe.temperature)], 1).float()
    strange = Strangeness.of([*(other.calibration for other in others), mine])
    parts = [*(other.scatter() for other in others), part]
    numbers = calibration(recipe, rows, len(others), parts, scores, own, strange)
    return store(recipe, part, numbers), float((scores.argmin(1) == len(others)).double().mean())
