"""Effects of errors on answers, against what perturbing a tensor really does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from retex_cli.io.inputs import Example
from retex_cli.models.compare import apart
from retex_cli.models.effects import effects
from retex_cli.models.network import Network


class Plain(nn.Module):
    """Two convolutions; the answer is an image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 3, 3, padding=1)
        nn.init.normal_(self.last.weight, std=0.5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(image).relu())


def build(config: dict[str, object]) -> nn.Module:
    torch.manual_seed(0)
    return Plain()


@pytest.fixture
def network(tmp_path: Path) -> Network:
    (tmp_path / "config.json").write_text(json.dumps({}))
    return Network(tmp_path, torch.device("cpu"), model=f"{__name__}:build")


def test_effects_are_what_small_errors_do(network: Network) -> None:
    draw = torch.Generator().manual_seed(1)
    rows = [Example(tensors={"image": torch.rand(3, 12, 12, generator=draw)}) for _ in range(24)]
    found = effects(network, rows)
    assert set(found) == {"first.weight", "first.bias", "last.weight", "last.bias"}
    inputs, weights = network.inputs(rows), network.module.state_dict()
    with torch.no_grad():
        wanted = network.module(**inputs)
        for name, effect in found.items():
            own = weights[name].clone()
            measured = []
            for _ in range(20):
                weights[name].copy_(own + 1e-3 * torch.randn(own.shape, generator=draw))
                measured.append(float(apart(network.module(**inputs), wanted).sum()) / 1e-6 / own.numel())
            weights[name].copy_(own)
            assert effect == pytest.approx(sum(measured) / 20, rel=0.6), name


def test_measuring_leaves_no_trace(network: Network) -> None:
    network.module.first.weight.requires_grad_(False)
    effects(network, [Example(tensors={"image": torch.rand(3, 8, 8)})])
    assert [p.requires_grad for p in network.module.parameters()] == [False, True, True, True]
    assert all(p.grad is None for p in network.module.parameters())
