"""Were the experts tuned from this base? The norms of their task vectors say so."""

from __future__ import annotations

import math
from collections.abc import Sequence

from retex_cli.merging.view import View

SAMPLED_TENSORS = 16
SAMPLED_ELEMENTS = 1 << 15

UNRELATED = 0.9
"""From this ratio of ``|tau|`` to ``|W0|`` on, an expert was not tuned from the base: unrelated weights give 1.4 (the
root of two), the hardest fine-tunes that we have seen 0.5."""


def norms(views: Sequence[View]) -> tuple[float, dict[str, float]]:
    """Frobenius norm of the base and of each task vector, on samples of the largest matrices of the model.

    Vectors are left out: normalisation weights near 1 look related in any two models. ``(0, {})`` without matrices.
    """
    matrices = [view for view in views if len(view.shape) > 1]
    largest = sorted(matrices, key=lambda view: (-view.numel, view.name))[:SAMPLED_TENSORS]
    squares: dict[str, float] = {}
    base_square = {task: 0.0 for view in largest for task in view.tasks}
    for view in largest:
        start = (view.numel - min(view.numel, SAMPLED_ELEMENTS)) // 2
        base, experts = view.load(start, min(view.numel, SAMPLED_ELEMENTS))
        whole = base.double().square().sum().item()
        for task, square in zip(view.tasks, (experts - base).double().square().sum(1).tolist(), strict=True):
            squares[task] = squares.get(task, 0.0) + square
            base_square[task] += whole
    return math.sqrt(max(base_square.values(), default=0.0)), {task: math.sqrt(s) for task, s in squares.items()}


def unrelated(base_norm: float, task_norms: dict[str, float]) -> list[str]:
    """The tasks whose task vector is about as large as the weights themselves."""
    return [task for task, norm in task_norms.items() if base_norm > 0 and norm >= UNRELATED * base_norm]
