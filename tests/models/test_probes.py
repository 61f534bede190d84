"""Inputs made without data: of a kind that the network takes, the same ones every time, images smooth."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from retex_cli.io.inputs import Example
from retex_cli.models.network import Network
from retex_cli.models.probes import FLAT, PROBES, flat, probes


class Own(nn.Module):
    """A first layer of some kind, and what it makes of what it reads."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first = {
            "bytes": nn.Conv2d(3, 4, 3),
            "image": nn.Conv2d(1, 4, 3),
            "large": nn.Conv2d(3, 4, 3),
            "vector": nn.Linear(7, 2),
            "tokens": nn.Embedding(11, 3),
            "nothing": nn.BatchNorm1d(3),
        }[kind]

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        if self.kind == "bytes":
            given = given.float() / 255
        if self.kind == "large" and given.shape[-1] < 100:
            raise ValueError("too small")
        return self.first(given).flatten(1)


def build(config: dict[str, str]) -> nn.Module:
    return Own(config["kind"])


def network(folder: Path, **config: object) -> Network:
    (folder / "config.json").write_text(json.dumps(config))
    return Network(folder, torch.device("cpu"), model=f"{__name__}:build")


@pytest.mark.parametrize(
    ("config", "shape", "dtype"),
    [
        ({"kind": "bytes"}, (3, 64, 64), torch.uint8),
        ({"kind": "image"}, (1, 64, 64), torch.float32),
        ({"kind": "image", "image_size": 20}, (1, 20, 20), torch.float32),
        ({"kind": "large"}, (3, 224, 224), torch.float32),
        ({"kind": "vector"}, (7,), torch.float32),
        ({"kind": "tokens"}, (24,), torch.int64),
    ],
)
def test_the_first_layer_tells_what_a_network_reads(
    tmp_path: Path, config: dict[str, object], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    own = network(tmp_path, **config)
    made = probes(own)
    assert len(made) == PROBES
    for example in made:
        assert (tuple(example.tensors["given"].shape), example.tensors["given"].dtype) == (shape, dtype)
    again = probes(own)
    assert all(torch.equal(a.tensors["given"], b.tensors["given"]) for a, b in zip(made, again, strict=True))
    assert not torch.equal(made[0].tensors["given"], made[1].tensors["given"])


def test_nothing_is_made_where_nothing_tells(tmp_path: Path) -> None:
    assert probes(network(tmp_path, kind="nothing")) == ()


def test_images_are_smooth_and_some_have_grain(tmp_path: Path) -> None:
    images = torch.stack([example.tensors["given"] for example in probes(network(tmp_path, kind="image"))])
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    steps = (images[..., 1:] - images[..., :-1]).square().mean((1, 2, 3)) / images.var((1, 2, 3)).clamp_min(1e-6)
    assert float(steps[::2].mean()) < 0.5, "of white noise it is 2"
    assert float(steps[1::2].mean()) > 2 * float(steps[::2].mean())


def test_texts_are_random_tokens_of_the_vocabulary(tiny_models: Path) -> None:
    made = probes(Network(tiny_models / "experts/cars", torch.device("cpu")))
    assert len({example.text for example in made}) == PROBES
    words = {word for example in made for word in (example.text or "").split()}
    assert {"brake", "stripes"} <= words
    assert not [word for word in words if word.startswith("[")], "special tokens come from the tokenizer"


@pytest.mark.parametrize("kind", ["image", "bytes"])
def test_flat_images_are_those_without_grain_at_a_tenth_of_their_contrast(tmp_path: Path, kind: str) -> None:
    made = probes(network(tmp_path, kind=kind))
    found = flat(made)
    assert len(found) == PROBES / 2
    step = 1.0 if kind == "bytes" else 1e-6
    for lively, dull in zip(made[::2], found, strict=True):
        before, after = lively.tensors["given"], dull.tensors["given"]
        assert (after.dtype, after.shape) == (before.dtype, before.shape)
        assert float(after.float().mean()) == pytest.approx(float(before.float().mean()), abs=step)
        assert float(after.float().std()) == pytest.approx(FLAT * float(before.float().std()), abs=step)


def test_flat_images_are_what_an_image_processor_reads(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    [found] = flat([Example(image=image, source="made")])
    [tensors] = flat([Example(tensors={"image": torch.from_numpy(image).permute(2, 0, 1)}, source="made")])
    assert isinstance(found.image, np.ndarray)
    assert found.image.dtype == np.uint8
    assert found.image.shape == image.shape
    assert np.array_equal(found.image, tensors.tensors["image"].permute(1, 2, 0).numpy())


def test_what_is_no_image_is_never_flat(tmp_path: Path) -> None:
    assert flat(probes(network(tmp_path, kind="vector"))) == ()
    assert flat(probes(network(tmp_path, kind="tokens"))) == ()
    assert flat([Example(text="a dog", source="made")]) == ()
