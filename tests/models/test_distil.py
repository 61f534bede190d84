"""Distillation brings a student nearer to its teacher, the same way on any number of threads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import ResNetConfig

from retex_cli.io.inputs import Example
from retex_cli.models.distil import (
    REPLACED,
    Loss,
    Schedule,
    _feature_loss,
    _reworded,
    _Watched,
    answer_loss,
    distil,
    mixed,
)
from retex_cli.models.network import Network
from retex_cli.models.student import Factors, Student
from retex_cli.progress import Silent


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, values: Tensor) -> Tensor:
        for layer in self.layers:
            values = layer(values).tanh()
        found: Tensor = self.head(values)
        return found


def build(config: object) -> nn.Module:
    del config
    torch.manual_seed(0)
    return Net().eval()


class Learner:
    """An offset of rank 2 on the first layer."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(1)
        self.left = (0.1 * torch.randn(6, 2, generator=draw)).requires_grad_()
        self.right = torch.randn(2, 6, generator=draw).requires_grad_()
        self.settled = 0

    @property
    def parameters(self) -> list[Tensor]:
        return [self.left, self.right]

    def values(self) -> dict[str, Tensor | Factors]:
        return {"layers.0.weight": (self.left, self.right)}

    def settle(self) -> None:
        self.settled += 1


def run(folder: Path, threads: int, steps: int) -> tuple[Loss, Learner]:
    (folder / "config.json").write_text(json.dumps({"id2label": {str(k): str(k) for k in range(3)}}))
    name = f"{__name__}:build"
    teacher, network = (Network(folder, torch.device("cpu"), model=name) for _ in range(2))
    with torch.no_grad():
        teacher.module.layers[0].weight += torch.outer(torch.ones(6), torch.linspace(-1, 1, 6))
    draw = torch.Generator().manual_seed(2)
    rows = [
        Example(tensors={"values": torch.randn(6, generator=draw)}, label=None, source=str(k), text=None, image=None)
        for k in range(33)
    ]
    learner = Learner()
    loss = distil(
        teacher, network, Student(network.module), learner, rows, Schedule(steps, 8, rate=0.03),
        seed=0, threads=threads, progress=Silent(),
    )  # fmt: skip
    return loss, learner


def test_the_student_learns(tmp_path: Path) -> None:
    early, _ = run(tmp_path, 1, 4)
    late, learner = run(tmp_path, 1, 150)
    assert late.features < 0.2 * early.features
    assert late.answers < 0.2 * early.answers
    assert learner.settled == 150 // 16 + 1


def test_threads_change_nothing(tmp_path: Path) -> None:
    (one, a), (two, b) = run(tmp_path, 1, 20), run(tmp_path, 2, 20)
    assert one == two
    assert torch.equal(a.left, b.left)
    assert torch.equal(a.right, b.right)


def test_features_are_what_layers_with_weights_give(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    network = Network(tmp_path, torch.device("cpu"), model=f"{__name__}:build")
    values = torch.randn(4, 6)
    features, answer = _Watched(network).run({"values": values})
    first = network.module.layers[0](values)
    assert len(features) == 2  # the head's output is the answer
    assert torch.equal(features[0], first)
    assert torch.equal(features[1], network.module.layers[1](first.tanh()))
    assert torch.equal(answer, network.module(values))


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(4))
        )
        self.head = nn.Linear(3, 2)

    def forward(self, pixel_values: Tensor) -> Tensor:
        found: Tensor = self.head(self.blocks(pixel_values).mean((2, 3)))
        return found


def normalised(config: object) -> nn.Module:
    del config
    return Normalised().eval()


def test_features_of_a_network_with_batchnorm_are_its_blocks(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    network = Network(tmp_path, torch.device("cpu"), model=f"{__name__}:normalised")
    images = torch.randn(4, 3, 5, 5)
    features, _ = _Watched(network).run({"pixel_values": images})
    first = network.module.blocks[0](images)
    assert len(features) == 4
    assert torch.equal(features[0], first)
    assert torch.equal(features[1], network.module.blocks[1](first))


def test_transformers_gives_the_blocks_of_its_own_networks_with_batchnorm(tmp_path: Path) -> None:
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8, 8], depths=[1, 2, 1], layer_type="basic", num_labels=2)
    config.architectures = ["ResNetForImageClassification"]
    config.save_pretrained(tmp_path)
    network = Network(tmp_path, torch.device("cpu"))
    features, answer = _Watched(network).run({"pixel_values": torch.randn(2, 3, 32, 32)})
    assert [one.shape[1] for one in features] == [4, 8, 8]  # every stage's, not those of the longest alone
    assert answer.shape == (2, 2)


def test_features_are_compared_by_their_spread_where_they_have_any() -> None:
    wanted, same = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0)), torch.ones(4, 5, 3)
    found = wanted + 1
    spread = (wanted - wanted.mean(0)).square().sum()
    assert float(_feature_loss([found], [wanted], None)) == pytest.approx(float(wanted.numel() / spread))
    assert float(_feature_loss([found, same + 1], [wanted, same], None)) == pytest.approx(float(30 / spread))
    mask = torch.ones(4, 5)
    mask[:, 3:] = 0
    found = wanted.clone()
    found[:, 3:] += 1
    assert float(_feature_loss([found], [wanted], mask)) == 0


@pytest.mark.parametrize("shape", [(4, 3), (4, 1), (4, 2, 5, 5)])
def test_answers_are_compared_by_what_they_are(shape: tuple[int, ...]) -> None:
    wanted = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert float(answer_loss(wanted, wanted)) == pytest.approx(0, abs=1e-6)
    near, far = (
        answer_loss(wanted + 0.1 * torch.arange(shape[1]).view(-1, *(1,) * (len(shape) - 2)) + 0.1, wanted),
        answer_loss(-wanted, wanted),
    )
    assert 0 < float(near) < float(far)


def test_some_words_of_a_text_are_replaced() -> None:
    given = Example(text=" ".join(["own"] * 400), label=None, source="1", tensors=None, image=None)
    found = _reworded(given, ["other", "another"], torch.Generator().manual_seed(0))
    words = (found.text or "").split()
    assert len(words) == 400
    assert set(words) == {"own", "other", "another"}
    assert abs(words.count("own") / 400 - (1 - REPLACED)) < 0.08


def test_what_is_no_text_is_left_alone() -> None:
    given = Example(text=None, label=None, source="1", tensors={"values": torch.zeros(6)}, image=None)
    assert _reworded(given, [], torch.Generator()) is given


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_blended_images_stay_what_they_are(dtype: torch.dtype) -> None:
    images = (255 * torch.rand(6, 3, 5, 5, generator=torch.Generator().manual_seed(0))).to(dtype)
    found = mixed({"image": images}, torch.Generator().manual_seed(1))["image"]
    assert found.dtype == dtype
    assert torch.equal(found[::2], images[::2])
    assert all(not torch.equal(ours, theirs) for ours, theirs in zip(found[1::2], images[1::2], strict=True))
    assert images.min() <= found.min() <= found.max() <= images.max()
    tokens = {"input_ids": torch.ones(2, 3, 4, dtype=torch.int64)}
    assert mixed(tokens, torch.Generator()) is tokens


def test_finer_files_take_smaller_steps() -> None:
    schedule = Schedule(steps=1, batch_size=1, rate=0.1, falls=2)
    assert schedule.finer(1.0) == schedule
    assert schedule.finer(0.5).rate == pytest.approx(0.025)
