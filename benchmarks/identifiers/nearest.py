"""Nearest mean and nearest neighbour by the cosine of the final embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from identifiers.form import Fitted, References, unit


def nearest_mean(references: References) -> Fitted:
    """One mean of unit vectors per task, itself scaled to unit length; float32."""
    means = unit(torch.stack([unit(part[:, -1].float()).mean(0) for part in references.values()]))
    return Fitted(lambda features: 1 - unit(features[:, -1].float()) @ means.T, means.nbytes)


def nearest_neighbour(references: References) -> Fitted:
    """Every reference is stored as a unit vector; a task is as close as its closest reference."""
    stored = [unit(part[:, -1].float()) for part in references.values()]

    def scores(features: Tensor) -> Tensor:
        rows = unit(features[:, -1].float())
        return torch.stack([1 - (rows @ part.T).amax(1) for part in stored], 1)

    return Fitted(scores, sum(part.nbytes for part in stored))
