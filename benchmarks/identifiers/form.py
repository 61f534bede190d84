"""What an identifier is to the harness: reference features in, scores of new features out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

References = Mapping[str, Tensor]
"""Per task, in sorted order, its reference features [n, layers, width]."""


@dataclass(frozen=True)
class Fitted:
    """``scores`` of features [m, layers, width] are [m, tasks], smaller is closer. ``bytes``: what has to be stored
    for all tasks together. ``chosen``: what the fit decided by itself."""

    scores: Callable[[Tensor], Tensor]
    bytes: int
    chosen: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Identifier:
    """One row. ``encoder``: "merged" or "base", whose features it reads. ``data_free``: fits without references."""

    name: str
    encoder: str
    fit: Callable[[References], Fitted]
    note: str = ""
    data_free: bool = False


def unit(rows: Tensor) -> Tensor:
    """Every vector [..., D] of length one; a zero vector stays zero."""
    return torch.nn.functional.normalize(rows, dim=-1)


def joined(features: Tensor, layers: Sequence[int]) -> Tensor:
    """Unit vectors of some layers side by side: [n, len(layers) * width]."""
    return unit(features[:, list(layers)].float()).flatten(1)
