"""Errors count by what they change in the answers of a network with BatchNorm, not by their energy."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from retex_cli.commands.expert_models import ExpertModels
from retex_cli.commands.offsets_file import layout_of
from retex_cli.commands.task_fit import Wish, match_experts
from retex_cli.commands.weigher import Weighed, Weigher
from retex_cli.io.checkpoint import open_checkpoint
from retex_cli.io.inputs import Example
from retex_cli.io.scratch import Scratch
from retex_cli.offsets.batchnorm import weights
from retex_cli.progress import Silent

if TYPE_CHECKING:
    from tests.conftest import Retex

MODULE = """
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.loud, self.loud_norm = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16, eps=2e-3)
        self.quiet, self.quiet_norm = nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16, eps=2e-3)
        self.last = nn.Linear(16, 5)

    def forward(self, image):
        state = self.loud_norm(self.loud(image)).relu()
        return self.last(self.quiet_norm(self.quiet(state)).relu().mean((2, 3)))


def build(config):
    return Net()
"""
LOUD = 30.0
"""Times as large as usual, which BatchNorm takes away again."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Merged weights and an expert: offsets of both convolutions have the same energy, ``loud`` is 30 times as large
    as ``quiet``."""
    space: dict[str, object] = {}
    exec(MODULE, space)
    torch.manual_seed(0)
    network = space["build"]({})
    with torch.no_grad():
        network.loud.weight *= LOUD
    network.train()
    with torch.no_grad():
        for _ in range(50):
            network(torch.rand(32, 3, 12, 12))
    merged = {name: value.clone() for name, value in network.eval().state_dict().items()}
    expert = dict(merged)
    for name in ("loud", "quiet"):
        offset = torch.randn(merged[f"{name}.weight"].shape)
        expert[f"{name}.weight"] = merged[f"{name}.weight"] + 0.5 * offset / offset.norm()
    for folder, tensors in (("merged", merged), ("expert", expert)):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
        (tmp_path / folder / "config.json").write_text("{}")
    (tmp_path / "loud_net.py").write_text(MODULE)
    (tmp_path / "retex.toml").write_text('[model]\nmodel = "loud_net:build"\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    sys.modules.pop("loud_net", None)


def weighed(
    here: Path, own: Sequence[Example] = (), without: frozenset[str] = frozenset(), aside: str = "offsets"
) -> Weighed:
    merged = open_checkpoint(str(here / "merged"))
    [fit] = match_experts({"x": str(here / "expert")}, merged, None, Wish("5%"))
    models = ExpertModels({"x": fit.expert}, {"x": fit.alignment}, torch.device("cpu"), "loud_net:build")
    inputs = {"x": own} if own else {}
    return Weigher(models, layout_of(merged), inputs, 2, Scratch(here / aside, "key"), without).of(fit, Silent())


@pytest.mark.parametrize("own", [False, True])
def test_what_batchnorm_takes_away_counts_little(here: Path, own: bool) -> None:
    rows = [Example(tensors={"image": image}, source="own") for image in torch.rand(16, 3, 12, 12)]
    found = weighed(here, rows if own else ())
    assert len(found.moved) == (0 if own else 32)
    ratio = found.weights["quiet.weight"] / found.weights["loud.weight"]
    assert LOUD / 5 < ratio < 5 * LOUD, "the root of a squared effect that is a thousand times as large"
    assert found.epsilons == {name: pytest.approx(2e-3) for name in ("loud_norm.running_var", "quiet_norm.running_var")}
    statistics = {name for name in found.weights if "running" in name}
    assert len(statistics) == 4
    assert all(found.weights[name] > 0 for name in statistics)


def test_a_network_is_asked_once_and_what_it_said_is_put_aside(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = weighed(here)
    monkeypatch.setattr(ExpertModels, "filled", lambda *_: pytest.fail("asked again"))
    again = weighed(here)
    assert (again.weights, again.epsilons) == (first.weights, first.epsilons)
    images = [torch.stack([each.tensors["image"] for each in found.moved]) for found in (first, again)]
    assert torch.equal(*images)


def test_without_effects_errors_count_as_usual(here: Path) -> None:
    found = weighed(here, without=frozenset({"effects"}))
    assert found.weights == weights(layout_of(open_checkpoint(str(here / "merged"))))
    assert found.epsilons
    assert len(found.moved) == 32, "for who compares answers"
    assert not weighed(here, without=frozenset({"effects", "compare"}), aside="other").moved


def test_without_a_network_nothing_is_known(here: Path) -> None:
    (here / "expert/config.json").unlink()
    assert weighed(here) == Weighed(weights(layout_of(open_checkpoint(str(here / "merged")))), {})


def test_a_fit_is_nearer_for_it(here: Path, retex: Retex) -> None:
    rows = {}
    for more in ((), ("--without", "effects")):
        result = retex(
            "fit-offsets", "--expert", "x=expert", "--merged", "merged", "-o", "out.safetensors", "--budget", "8%",
            "--overwrite", "--json", *more,
        )  # fmt: skip
        assert result.code == 0, result.err
        rows[more] = result.json["tasks"]["x"]["kept"]
    by_effect, by_energy = rows.values()
    assert by_effect["merged"] == by_energy["merged"]
    assert by_effect["distance"] < 0.5 * by_energy["distance"], json.dumps(list(rows.values()))
