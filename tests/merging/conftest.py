"""Small models as tensors: a base and experts near it, of awkward sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

Model = dict[str, Tensor]
Maker = Callable[..., tuple[Model, dict[str, Model]]]

SHAPES = {"matrix": (30, 21), "fifty": (50,), "one": (1,), "empty": (0, 4), "conv": (6, 2, 3, 3), "long": (9000,)}


@pytest.fixture
def make_models() -> Maker:
    """``make_models(tasks=3, shapes=SHAPES, seed=0)`` -> base and experts, float32."""

    def make(
        tasks: int = 3, shapes: dict[str, tuple[int, ...]] = SHAPES, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> tuple[Model, dict[str, Model]]:
        draw = torch.Generator().manual_seed(seed)
        base = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}
        experts = {
            f"task{t}": {
                name: (tensor.float() + 0.1 * torch.randn(tensor.shape, generator=draw)).to(dtype)
                for name, tensor in base.items()
            }
            for t in range(tasks)
        }
        return base, experts

    return make


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from more threads, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
