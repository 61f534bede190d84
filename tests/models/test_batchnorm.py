"""BatchNorm statistics measured on inputs: what one large batch has, and the network uses them afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from retex_cli.models.batchnorm import batchnorm_layers, measure_batchnorm
from retex_cli.progress import Silent


class _Bare:
    """As much of a network as is needed."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def logits(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.module(inputs["x"])


@pytest.fixture
def module() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, momentum=0.01), nn.Dropout(0.5)).eval()


def test_statistics_are_those_of_the_inputs(module: nn.Sequential, tmp_path: Path) -> None:
    x = 3 + 2 * torch.randn(8, 2, 5, 5)
    found = measure_batchnorm(_Bare(module), [{"x": x[:4]}, {"x": x[4:]}], Silent())  # type: ignore[arg-type]
    hidden = module[0](x).detach()
    torch.testing.assert_close(found["1.running_mean"], hidden.mean((0, 2, 3)))
    halves = torch.stack([half.var((0, 2, 3)) for half in hidden.split(4)])
    torch.testing.assert_close(found["1.running_var"], halves.mean(0))
    torch.testing.assert_close(module[1].running_mean, found["1.running_mean"])
    assert not module[1].training
    assert not module[2].training
    assert module[1].momentum == 0.01


def test_layers_without_running_statistics_are_none_of_ours() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False), nn.LayerNorm(3))
    assert list(batchnorm_layers(module)) == ["0"]
