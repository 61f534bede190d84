"""Features of networks whose layers differ: pooled right, side by side in one array, from many threads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from retex_cli.errors import RetexError
from retex_cli.io.inputs import Example
from retex_cli.models.encoder import Encoder, feature_layers, pool
from retex_cli.models.network import Network
from retex_cli.progress import Silent

CPU = torch.device("cpu")


class Blocks(nn.Module):
    """Three blocks of widths 4, 6 and 5; the last one's output is in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), Pair()])
        self.head = nn.Sequential(nn.Linear(5, 7), nn.ReLU())

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        state = pixel_values
        for block in self.blocks:
            state = block(state)
        return self.head(state[0].mean((2, 3)))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(6, 5, 1)

    def forward(self, state: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.inner(state), None


def network(folder: Path, monkeypatch: pytest.MonkeyPatch, module: nn.Module) -> Network:
    (folder / "config.json").write_text(json.dumps({}))
    monkeypatch.setattr("retex_cli.models.network._from_function", lambda *_: module)
    return Network(folder, CPU, model="any:any")


def images(count: int) -> list[Example]:
    draw = torch.Generator().manual_seed(0)
    return [Example(tensors={"pixel_values": torch.randn(3, 9, 9, generator=draw)}) for _ in range(count)]


def test_layers_of_different_widths_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = network(tmp_path, monkeypatch, Blocks())
    examples = images(23)
    found = Encoder(built, threads=4).features(examples, 2, Silent())
    assert (found.shape, found.dtype) == ((23, 3, 6), torch.float32)
    assert not found[:, 0, 4:].any()
    assert not found[:, 2, 5:].any()
    with torch.no_grad():
        state = built.module.blocks[0](torch.stack([example.tensors["pixel_values"] for example in examples]))
        torch.testing.assert_close(found[:, 0, :4], state.mean((2, 3)), rtol=2e-2, atol=2e-2)
        state = built.module.blocks[1](state)
        torch.testing.assert_close(found[:, 1], state.mean((2, 3)), rtol=2e-2, atol=2e-2)


def test_layers_are_the_longest_list_or_what_the_network_names() -> None:
    module = Blocks()
    assert feature_layers(module) == ["blocks.0", "blocks.1", "blocks.2"]
    module.feature_layers = ("head.0", "blocks.1")
    assert feature_layers(module) == ["head.0", "blocks.1"]
    assert feature_layers(nn.Sequential(nn.Linear(1, 1), nn.ReLU())) == ["0", "1"]
    assert feature_layers(nn.Linear(1, 1)) == []
    module.feature_layers = ["blocks.9"]
    with pytest.raises(RetexError, match=r"no submodule 'blocks\.9'"):
        feature_layers(module)


def test_a_network_without_layers_to_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RetexError, match="Flatten has no ModuleList or Sequential"):
        Encoder(network(tmp_path, monkeypatch, nn.Flatten()), threads=1)
    module = Blocks()
    module.unused = nn.Linear(1, 1)
    module.feature_layers = ["blocks.0", "unused"]
    with pytest.raises(RetexError, match="layer 'unused' of Blocks gave no tensor"):
        Encoder(network(tmp_path, monkeypatch, module), threads=1).features(images(1), 1, Silent())


@pytest.mark.parametrize("family", ["ResNet", "ConvNext"])
def test_convolutional_transformers_models_give_features(tmp_path: Path, family: str) -> None:
    import transformers

    config = getattr(transformers, f"{family}Config")(
        num_channels=3, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 2], num_stages=2
    )
    model = getattr(transformers, f"{family}ForImageClassification")(config).eval()
    model.save_pretrained(tmp_path)
    built = Network(tmp_path, CPU)
    built.load(model.state_dict().items(), "here")
    examples = [Example(tensors={"pixel_values": example}) for example in torch.randn(3, 3, 32, 32)]
    found = Encoder(built, threads=1).features(examples, 2, Silent())
    assert found.shape == (3, 3, 8)
    assert found[:, -1].any(1).all()
    assert not found[:, 0, 4:].any()


def test_padding_does_not_count() -> None:
    state = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert pool(state, mask).tolist() == [[1.0, 2.0], [6.0, 7.0]]
    assert pool(state, None).tolist() == [[2.0, 3.0], [8.0, 9.0]]
    assert pool(torch.ones(2, 5, 3, 4).bfloat16(), None).tolist() == [[1.0] * 5] * 2
    assert pool(torch.ones(2, 5), mask).shape == (2, 5)
