"""Each input judged without itself, where that takes refitting."""

from __future__ import annotations

from collections.abc import Callable

import torch

EXACT_UP_TO = 64
"""Reference inputs per task that are left out one by one; more are left out in ``FOLDS`` interleaved folds."""

FOLDS = 16


def left_out(rows: torch.Tensor, judge: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """``judge(the other rows, a fold)`` of every fold of one task's ``rows`` [n >= 2, D], put together: [n]."""
    count = len(rows)
    folds = count if count <= EXACT_UP_TO else FOLDS
    found = rows.new_empty(count)
    for fold in range(folds):
        held = torch.arange(count) % folds == fold
        found[held] = judge(rows[~held], rows[held])
    return found
