"""Synthetic features: clouds of points around one centre per task and layer."""

from __future__ import annotations

from typing import Protocol

import pytest
import torch


class Clouds(Protocol):
    """``clouds(tasks, n, layers=..., width=..., gap=..., seed=...)`` -> features of every task."""

    def __call__(
        self, tasks: str, n: int, *, layers: int = 3, width: int = 12, gap: float = 1.0, seed: int = 0
    ) -> dict[str, torch.Tensor]: ...


@pytest.fixture
def clouds() -> Clouds:
    """Each task: a centre per layer, a few strong directions of its own around it, and noise; ``gap`` between centres.

    The centres depend on task, layers and width alone, so another ``seed`` gives other inputs of the same tasks.
    """

    def make(
        tasks: str, n: int, *, layers: int = 3, width: int = 12, gap: float = 1.0, seed: int = 0
    ) -> dict[str, torch.Tensor]:
        features = {}
        for task in tasks:
            fixed = torch.Generator().manual_seed(ord(task))
            common = torch.randn(layers, width, generator=torch.Generator().manual_seed(7))
            centre = common * 2 + gap * torch.randn(layers, width, generator=fixed)
            directions = torch.randn(layers, 3, width, generator=fixed)
            drawn = torch.Generator().manual_seed(1000 * seed + ord(task))
            strong = torch.einsum("nlk,lkd->nld", torch.randn(n, layers, 3, generator=drawn), directions)
            features[task] = centre + 0.6 * strong + 0.5 * torch.randn(n, layers, width, generator=drawn)
        return features

    return make
