"""The identifier of ReTeX (arXiv 2606.26902), as the same laboratory computes it in SiM (arXiv 2606.22589)."""

from __future__ import annotations

import torch
from torch import Tensor

from identifiers.form import Fitted, References, unit


def residual(references: References) -> Fitted:
    """Distance of the L2-normalised final embedding to the task's affine subspace of ``round(0.1 D)`` directions.

    ``mu`` the mean of the references, V the right singular vectors of what is left of them, at most n - 1; float32.
    """
    parts = []
    for features in references.values():
        rows = unit(features[:, -1].float())
        mean = rows.mean(0)
        rank = min(max(1, round(0.1 * rows.shape[1])), len(rows) - 1)
        parts.append((mean, torch.linalg.svd(rows - mean, full_matrices=False)[2][:rank]))

    def scores(features: Tensor) -> Tensor:
        rows = unit(features[:, -1].float())
        columns = []
        for mean, basis in parts:
            away = rows - mean
            columns.append((away - (away @ basis.T) @ basis).norm(dim=1))
        return torch.stack(columns, 1)

    return Fitted(scores, sum(mean.nbytes + basis.nbytes for mean, basis in parts))
