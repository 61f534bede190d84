"""A bigger file is never worse than a smaller one, none worse than merged weights: by what networks answer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from retex_cli.commands import guard
from retex_cli.commands.refine import Refiner
from retex_cli.models.compare import apart
from retex_cli.offsets.decompose import Components, decompose

if TYPE_CHECKING:
    from tests.conftest import Retex

MODULE = """
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 24, 3), nn.Conv2d(24, 3, 3)

    def forward(self, image):
        return self.last(self.middle(self.first(image).relu()).relu())


def build(config):
    return Net()
"""
SHAPES = {"first": (24, 3, 3, 3), "middle": (24, 24, 3, 3), "last": (3, 24, 3, 3)}


def weights(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in SHAPES.items():
        found[f"{name}.weight"] = torch.randn(shape, generator=draw) * (2 / (9 * shape[1])) ** 0.5
        found[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=draw)
    return found


def save(folder: Path, tensors: dict[str, torch.Tensor], config: bool = True) -> None:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text("{}")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A merged checkpoint and two experts: ``far`` has other weights by two fifths, ``same`` has other weights and the
    very same answers."""
    merged, other = weights(0), weights(1)
    save(tmp_path / "merged", merged)
    save(tmp_path / "experts/far", {name: value + 0.4 * other[name] for name, value in merged.items()})
    scaled = dict(merged)
    for name, factor in (("first", 4.0), ("last", 0.25)):
        scaled[f"{name}.weight"] = factor * merged[f"{name}.weight"]
    scaled["first.bias"], scaled["middle.bias"] = 4 * merged["first.bias"], 4 * merged["middle.bias"]
    save(tmp_path / "experts/same", scaled)
    (tmp_path / "plain_net.py").write_text(MODULE)
    (tmp_path / "retex.toml").write_text('[model]\nmodel = "plain_net:build"\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("plain_net", None)


def fit(retex: Retex, task: str, budget: str, *more: str) -> tuple[dict[str, object], str]:
    """The task's row of the report, and the notes."""
    result = retex(
        "fit-offsets", "--expert", f"{task}=experts/{task}", "--merged", "merged", "-o", "out.safetensors",
        "--budget", budget, "--overwrite", "--json", *more,
    )  # fmt: skip
    assert result.code == 0, result.err
    row = result.json["tasks"][task]  # type: ignore[index]
    assert row["offset_bytes"] <= row["budget_bytes"]
    return row, result.err


def test_offsets_that_answer_worse_than_none_are_not_kept(here: Path, retex: Retex) -> None:
    row, notes = fit(retex, "same", "3%")
    assert "same: with offsets within" in notes
    assert "than with merged weights alone" in notes
    assert "none are kept" in notes
    assert row["kept"]["budget_bytes"] == 0
    assert row["kept"]["distance"] == row["kept"]["merged"] < 1e-6 < row["kept"]["whole"]
    assert row["offset_bytes"] < 40
    assert retex("recover", "--merged", "merged", "--offsets", "out.safetensors", "--task", "same", "-o", "x").code == 0
    merged = load_file("merged/model.safetensors")
    assert all(torch.equal(value, merged[name]) for name, value in load_file("x/model.safetensors").items())


def test_a_bigger_budget_is_never_worse(here: Path, retex: Retex) -> None:
    rows = [fit(retex, "far", budget) for budget in ("2%", "5%", "10%", "30%")]
    distances = [row["kept"]["distance"] for row, _ in rows]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] < rows[0][0]["kept"]["merged"]
    assert all(row["kept"]["distance"] <= row["kept"]["whole"] for row, _ in rows)
    small, larger, large, _ = rows
    assert all("kept" not in notes and "BatchNorm" not in notes for _, notes in (small, large))
    assert small[0]["kept"]["inputs"] == 32 + 16, "flat images beside those with contrast"
    assert small[0]["kept"]["distance"] < 0.5 * larger[0]["kept"]["whole"], "more weights alone is worse here"
    assert larger[0]["kept"]["budget_bytes"] == small[0]["budget_bytes"]
    assert "than with fewer" in larger[1]
    assert rows[3][0]["kept"]["distance"] < 0.8 * rows[3][0]["kept"]["whole"], "shared out by effect on answers"
    without, _ = fit(retex, "far", "30%", "--without", "effects")
    assert without["kept"]["distance"] == without["kept"]["whole"] == rows[3][0]["kept"]["whole"]


def test_what_is_nearer_by_chance_gives_way_on_inputs_of_the_task() -> None:
    draw = torch.Generator().manual_seed(0)
    distances = torch.rand(256, generator=draw) + 0.1
    luck = torch.randn(256, generator=draw)
    luck = (0.5 * (luck - luck.mean())).exp()
    smaller = guard._Tried(b"", 1, distances)
    lucky, better = (guard._Tried(b"", 2, share * luck * distances) for share in (0.98, 0.8))
    assert lucky.mean < smaller.mean
    for doubt, gives_way in ((guard.OWN, True), (guard.MATCHED, True), (guard.MADE, False)):
        assert lucky.worse(smaller, doubt.smaller, doubt.errors) == gives_way
        assert not better.worse(smaller, doubt.smaller, doubt.errors)


def test_trained_offsets_may_be_further_off_on_most_inputs_if_they_are_on_none_by_much() -> None:
    smaller = torch.full((256,), 1e-5)
    smaller[::16] = 2.0
    trained = torch.full((256,), 2e-5)
    by_ratios, summed = (guard._Tried(b"", 2, trained, summed=each) for each in (False, True))
    assert by_ratios.worse(guard._Tried(b"", 1, smaller), guard.OWN.smaller, guard.OWN.errors)
    assert not summed.worse(guard._Tried(b"", 1, smaller, summed=True), guard.TRAINED.smaller, guard.TRAINED.errors)
    assert summed.mean == pytest.approx(2e-5)
    assert guard._Tried(b"", 1, smaller, summed=True).worse(summed, guard.TRAINED.smaller, guard.TRAINED.errors)


@pytest.mark.parametrize("more", [(), ("--refine", "--inputs", "far=inputs.safetensors")])
def test_a_smaller_fit_that_is_kept_is_the_smaller_file_to_the_bit(
    here: Path, retex: Retex, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    images = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    save_file({"image": images}, here / "inputs.safetensors")

    def telling(matrix: torch.Tensor, rank: int) -> Components:
        found = decompose(matrix, rank)
        return replace(found, left=found.left * (1 + rank / 1000))

    monkeypatch.setattr("retex_cli.offsets.fit.decompose", telling)  # as a randomised one: for each rank others
    monkeypatch.setattr(guard._Tried, "mean", property(lambda tried: float(tried.budget != RUNG)))
    monkeypatch.setattr(guard._Tried, "worse", lambda tried, other, *_: other.mean < tried.mean)
    monkeypatch.setattr(Refiner, "refine", lambda self, fit, fitter, progress: fitter.finish())
    files = []
    for budget in (str(RUNG), "5%"):
        row, _ = fit(retex, "far", budget, *more)
        assert row["kept"]["budget_bytes"] == RUNG
        files.append(load_file("out.safetensors")["offsets/far"])
    assert torch.equal(*files)


def test_a_fit_that_gives_way_to_merged_weights_gives_way_to_a_smaller_file_that_does_not(
    here: Path, retex: Retex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the larger file of the two would be the worse."""
    monkeypatch.setattr(guard._Tried, "worse", lambda tried, other, *_: tried.budget > RUNG and other.budget == 0)
    files = []
    for budget in (str(RUNG), "30%"):
        row, _ = fit(retex, "far", budget)
        assert row["kept"]["budget_bytes"] == RUNG
        files.append(load_file("out.safetensors")["offsets/far"])
    assert torch.equal(*files)


def test_what_is_no_better_on_one_kind_of_inputs_gives_way_though_it_is_on_the_other(
    here: Path, retex: Retex, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, _ = fit(retex, "far", "30%")
    assert row["kept"]["budget_bytes"] == row["budget_bytes"]

    def flat_ones_alike(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        far = apart(found, wanted)
        assert len(far) == 48
        far[32:] = 1.0
        return far

    monkeypatch.setattr(guard, "apart", flat_ones_alike)
    row, notes = fit(retex, "far", "30%")
    assert row["kept"]["budget_bytes"] == 0
    assert "merged weights alone" in notes


@pytest.mark.parametrize(("more", "asked"), [((), True), (("--without", "training"), False)])
def test_trained_offsets_are_judged_by_what_they_were_trained_to_lessen(
    here: Path, retex: Retex, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], asked: bool
) -> None:
    images = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    save_file({"image": images}, here / "inputs.safetensors")
    judged = []
    monkeypatch.setattr(guard, "diverged", lambda found, wanted: judged.append(1) or apart(found, wanted))
    fit(retex, "far", "5%", "--refine", "--inputs", "far=inputs.safetensors", *more)
    assert bool(judged) == asked


RUNG = int(0.02 * 4 * sum(tensor.numel() for tensor in weights(0).values()))


def test_the_same_bytes_for_any_number_of_threads(here: Path, retex: Retex) -> None:
    fit(retex, "far", "5%", "--threads", "1")
    before = Path("out.safetensors").read_bytes()
    fit(retex, "far", "5%", "--threads", "3")
    assert Path("out.safetensors").read_bytes() == before


def test_without_a_network_weights_alone_decide_and_that_is_said_once(here: Path, retex: Retex) -> None:
    for task in ("far", "same"):
        (here / "experts" / task / "config.json").unlink()
    row, notes = fit(retex, "same", "3%", "--expert", "far=experts/far")
    assert notes.count("offsets are chosen by weights alone") == 1
    assert "has no config.json" in notes
    assert "kept" not in row


def test_a_network_that_cannot_be_built_or_asked_is_said_once(here: Path, retex: Retex) -> None:
    row, notes = fit(retex, "same", "3%", "--expert", "far=experts/far", "--model", "plain_net:nothing")
    assert notes.count("offsets are chosen by weights alone") == 1
    assert "plain_net" in notes
    assert "kept" not in row


def test_an_exact_expert_needs_no_guard(here: Path, retex: Retex) -> None:
    row, notes = fit(retex, "same", "3%", "--lossless")
    assert "kept" not in row
    assert "kept" not in notes


def test_refined_offsets_are_compared_on_the_tasks_own_inputs(here: Path, retex: Retex) -> None:
    images = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    save_file({"image": images}, here / "inputs.safetensors")
    row, _ = fit(retex, "far", "5%", "--refine", "--inputs", "far=inputs.safetensors")
    assert row["kept"]["inputs"] == 16
    assert row["kept"]["distance"] < row["kept"]["merged"]
