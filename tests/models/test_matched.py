"""Inputs that nobody gave get the statistics that BatchNorm layers keep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from retex_cli.models.batchnorm import measure_batchnorm
from retex_cli.models.matched import GROUP, STEPS, matched
from retex_cli.models.network import Network
from retex_cli.models.probes import PROBES, probes
from retex_cli.progress import Silent


class Own(nn.Module):
    """Two convolutions on bytes, or on what is no byte; ``kind`` says what is different."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.Conv2d(3, 6, 3, stride=2), nn.Conv2d(6, 8, 3, stride=2)
        norms = (nn.GroupNorm(2, 6), nn.GroupNorm(2, 8)) if kind == "no BatchNorm" else map(nn.BatchNorm2d, (6, 8))
        self.norms = nn.ModuleList(norms)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        if self.kind == "bytes alone":
            image = image >> 0
        if self.kind == "scaled by type":
            image = image / 255 if image.dtype == torch.uint8 else image
        if self.kind == "out of reach":
            image = image.detach()
        x = self.norms[0](self.first(image.float())).relu()
        return self.norms[1](self.second(x)).mean((2, 3))


def build(config: dict[str, str]) -> nn.Module:
    torch.manual_seed(0)
    return Own(config["kind"])


@pytest.fixture
def network(tmp_path: Path, request: pytest.FixtureRequest) -> Network:
    (tmp_path / "config.json").write_text(json.dumps({"kind": getattr(request, "param", "bytes"), "image_size": 24}))
    return Network(tmp_path, torch.device("cpu"), model=f"{__name__}:build")


class Counted(Silent):
    steps = 0

    def advance(self, steps: int = 1) -> None:
        self.steps += steps


def trained(network: Network) -> dict[str, torch.Tensor]:
    """Running statistics of dark images with bright bars, which random ones are far from."""
    images = 20 * torch.rand(64, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    images[:, :, :, 8:12] += 200
    return measure_batchnorm(network, [{"image": images}], Silent())


def far(network: Network, images: torch.Tensor, wanted: dict[str, torch.Tensor]) -> float:
    found = measure_batchnorm(network, [{"image": images}], Silent())
    network.module.load_state_dict(wanted, strict=False)
    return sum(float((found[name] - wanted[name]).square().mean() / wanted[name].square().mean()) for name in wanted)


def test_what_is_made_gets_the_statistics_of_what_was_trained_on(network: Network) -> None:
    wanted = trained(network)
    made, progress = probes(network), Counted()
    moved = matched(network, made, 1, progress)
    assert len(moved) == len(made) == PROBES
    assert progress.steps == STEPS * PROBES // GROUP
    before, after = (torch.stack([each.tensors["image"].float() for each in rows]) for rows in (made, moved))
    assert far(network, after, wanted) < 0.3 * far(network, before, wanted)
    assert before.min() <= after.min() < after.max() <= before.max()
    again = matched(network, made, 3, Silent())
    assert all(torch.equal(a.tensors["image"], b.tensors["image"]) for a, b in zip(moved, again, strict=True))
    assert all(parameter.grad is None for parameter in network.module.parameters())


@pytest.mark.parametrize("network", ["no BatchNorm", "bytes alone", "scaled by type", "out of reach"], indirect=True)
def test_nothing_is_moved_that_cannot_be(network: Network) -> None:
    assert matched(network, probes(network), 1, Silent()) == ()
