"""The whole job on a network that transformers does not know: convolutions, BatchNorm, a function that builds it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

import retex_cli
from retex_cli.commands import refine

if TYPE_CHECKING:
    from tests.conftest import Retex

MODULE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
            for a, b in ((3, 8), (8, 12), (12, 16))
        )
        self.fc = nn.Linear(16, classes) if classes else nn.Identity()

    def forward(self, pixel_values):
        state = pixel_values.float() / 255
        for block in self.blocks:
            state = block(state)
        return self.fc(state.mean((2, 3)))


def build(config):
    return Net(len(config.get("id2label", ())))
"""
SIDES = {"bars": ("across", "down"), "spots": ("many", "none", "one")}


def pictures(task: str, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [count, 3, 16, 16] and labels: bars in red, spots in blue, on noise."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, 16, 16, generator=draw) * 60
    labels = torch.arange(count) % len(SIDES[task])
    for image, label in zip(images, labels.tolist(), strict=True):
        where = torch.randint(2, 14, (8,), generator=draw).tolist()
        if task == "bars":
            image[0, :, where[0]] = 220
            if label == 0:
                image[0] = image[0].T.clone()
        else:
            for k in range((4, 0, 1)[label]):
                image[2, where[2 * k] - 2 : where[2 * k] + 2, where[2 * k + 1] - 2 : where[2 * k + 1] + 2] = 220
    return images.to(torch.uint8), labels


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base, two experts tuned from it, data and ``retex.toml`` with ``model = "tiny_cnn:build"``."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "tiny_cnn.py").write_text(MODULE)
    space: dict[str, object] = {}
    exec(MODULE, space)
    torch.manual_seed(0)
    base = space["build"]({}).state_dict()
    toml = ['[model]\nbase = "base"\nmodel = "tiny_cnn:build"\n\n[offsets]\nbudget = "60%"\n']
    save(folder / "base", base, {"hidden": 16})
    (folder / "data").mkdir()
    for task, names in SIDES.items():
        config = {"id2label": {str(i): name for i, name in enumerate(names)}}
        torch.manual_seed(1)
        network = space["build"](config)
        network.load_state_dict({**network.state_dict(), **base})
        images, labels = pictures(task, 96, seed=2)
        body, head = network.blocks.parameters(), network.fc.parameters()
        optimiser = torch.optim.Adam([{"params": body, "lr": 2e-3}, {"params": head, "lr": 3e-2}])
        for _ in range(60):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(network(images), labels).backward()
            optimiser.step()
        save(folder / "experts" / task, network.state_dict(), config)
        save_file({"pixel_values": pictures(task, 48, seed=3)[0]}, folder / f"data/{task}-inputs.safetensors")
        images, labels = pictures(task, 48, seed=4)
        save_file(
            {"pixel_values": images, "labels": labels},
            folder / f"data/{task}-test.safetensors",
            {"labels": json.dumps(names)},
        )
        toml.append(
            f'\n[tasks.{task}]\nexpert = "experts/{task}"\n'
            f'inputs = "data/{task}-inputs.safetensors"\ntest = "data/{task}-test.safetensors"\n'
        )
    (folder / "retex.toml").write_text("".join(toml))
    return folder


def save(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, object]) -> None:
    folder.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def here(tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy whose outputs are its own; the current directory lies beside it, not in it."""
    folder = tmp_path / "workspace"
    folder.mkdir()
    for path in tuned.iterdir():
        (folder / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield folder
    sys.modules.pop("tiny_cnn", None)


def test_experts_are_merged_recovered_identified_and_scored(here: Path, retex: Retex) -> None:
    for command in ("merge", "fit-offsets", "build-signatures"):
        result = retex(command, "-w", here, "--quiet")
        assert result.code == 0, result.err
    merged = load_file(here / "merged/model.safetensors")
    experts = [load_file(here / f"experts/{task}/model.safetensors") for task in SIDES]
    for name in ("blocks.1.1.running_mean", "blocks.1.1.running_var"):
        torch.testing.assert_close(merged[name], (experts[0][name] + experts[1][name]) / 2)
    result = retex("eval", "-w", here, "--json")
    assert result.code == 0, result.err
    for task in SIDES:
        entry = result.json["tasks"][task]
        assert entry["expert"] > 0.9, "the network with the expert's statistics answers"
        assert entry["agreement"]["K"] >= 0.9
        assert entry["identified"] > 0.9
    result = retex("identify", here / "data/spots-test.safetensors", "-w", here, "--json")
    assert result.code == 0, result.err
    assert sum(found["task"] == "spots" for found in result.lines) > 43
    save_file({"pixel_values": torch.zeros(1, 3, 8, 16, dtype=torch.uint8)}, "small.safetensors")
    result = retex("identify", "small.safetensors", "-w", here)
    assert result.code == 1
    assert "row 1: 'pixel_values' is [3, 8, 16], the reference inputs have [3, 16, 16]" in result.err


def test_a_merge_measures_in_the_workspaces_own_network(here: Path, retex: Retex) -> None:
    """From another folder, the module beside ``retex.toml`` is found by merges that run inputs, too."""
    result = retex("merge", "-w", here, "--batchnorm", "reestimate", "--alpha", "auto", "--method", "task_arithmetic")
    assert result.code == 0, result.err
    merged = load_file(here / "merged/model.safetensors")
    experts = [load_file(here / f"experts/{task}/model.safetensors") for task in SIDES]
    name = "blocks.1.1.running_mean"
    assert not torch.allclose(merged[name], (experts[0][name] + experts[1][name]) / 2), "it was measured anew"


def test_small_variances_beside_large_ones_come_back(
    tmp_path: Path, retex: Retex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that does not matter to the largest of them would be the end of the smallest."""
    monkeypatch.chdir(tmp_path)
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(256, 64, generator=draw)
    spread = torch.linspace(-4, 4, 256)
    experts = [10 ** (spread + 0.3 * torch.randn(256, generator=draw)) for _ in range(2)]
    save_file({"conv.weight": base, "bn.running_var": 10**spread}, "base.safetensors")
    for name, variance in zip("ab", experts, strict=True):
        tuned = base + 0.1 * torch.randn(256, 64, generator=draw)
        save_file({"conv.weight": tuned, "bn.running_var": variance}, f"{name}.safetensors")
    given = ("--expert", "a=a.safetensors", "--expert", "b=b.safetensors")
    result = retex("merge", "--base", "base.safetensors", *given, "-o", "m.safetensors")
    assert result.code == 0, result.err
    assert retex("fit-offsets", "--merged", "m.safetensors", *given, "--budget", "5%").code == 0
    assert retex("recover", "--merged", "m.safetensors", "--task", "a", "-o", "back.safetensors").code == 0
    ratio = load_file("back.safetensors")["bn.running_var"] / experts[0]
    assert ratio.min() > 0.5
    assert ratio.max() < 2


def test_recovery_without_identification_never_imports_the_module(here: Path, retex: Retex) -> None:
    for command in ("merge", "fit-offsets"):
        assert retex(command, "-w", here, "--quiet").code == 0
    (here / "tiny_cnn.py").unlink()
    sys.modules.pop("tiny_cnn")  # a fit asks the network
    result = retex("recover", "--task", "bars", "-w", here, "-o", "back/", "--quiet")
    assert result.code == 0, result.err
    assert "tiny_cnn" not in sys.modules
    back, expert = load_file("back/model.safetensors"), load_file(here / "experts/bars/model.safetensors")
    assert {name: value.shape for name, value in back.items()} == {n: value.shape for n, value in expert.items()}
    assert json.loads(Path("back/config.json").read_text()) == {"id2label": {"0": "across", "1": "down"}}


@pytest.mark.parametrize("flag", ["nowhere:build", "tiny_cnn:nothing"])
def test_the_flag_beats_the_file_and_a_wrong_one_is_wrong_usage(here: Path, retex: Retex, flag: str) -> None:
    assert retex("merge", "-w", here, "--quiet").code == 0
    result = retex("build-signatures", "-w", here, "--model", flag)
    assert result.code == 2
    assert flag in result.err


def test_offsets_refined_on_inputs_are_nearer_and_within_the_budget(here: Path, retex: Retex) -> None:
    assert retex("merge", "-w", here).code == 0
    budget = ("--budget", "12%")
    agreement = {}
    for how, flags in {"plain": (), "refined": ("--refine",)}.items():
        name = here / f"{how}.safetensors"
        fitted = retex("fit-offsets", "-w", here, *budget, *flags, "-o", name, "--json")
        assert fitted.code == 0, fitted.err
        for row in fitted.json["tasks"].values():  # type: ignore[attr-defined]
            assert row["offset_bytes"] <= row["budget_bytes"]
        assert "BatchNorm" not in fitted.err
        agreement[how] = distances(here, retex, name)
    for task in SIDES:
        assert agreement["refined"][task] < agreement["plain"][task]
    recipe = retex("inspect", here / "refined.safetensors", "--json").json["recipe"]["refine"]  # type: ignore[index]
    assert {task: each["inputs"] for task, each in recipe["inputs"].items()} == dict.fromkeys(SIDES, 48)


def test_a_shared_budget_follows_answers_where_they_are_looked_at(here: Path, retex: Retex) -> None:
    assert retex("merge", "-w", here).code == 0
    budgets = {}
    for how, flags in {"weights": (), "answers": ("--refine",)}.items():
        line = ("fit-offsets", "-w", here, "--total-budget", "12%", *flags, "-o", here / f"{how}.safetensors", "--json")
        fitted = retex(*line)
        assert fitted.code == 0, fitted.err
        rows = fitted.json["tasks"].values()  # type: ignore[attr-defined]
        assert all(0 < row["offset_bytes"] <= row["budget_bytes"] for row in rows)
        budgets[how] = [row["budget_bytes"] for row in rows]
    assert budgets["weights"] != budgets["answers"]
    assert abs(sum(budgets["weights"]) - sum(budgets["answers"])) <= 2


@pytest.mark.parametrize(("flags", "times"), [((), 1), (("--without", "compare"), 0)])
def test_texts_made_without_data_are_doubted_once(made: Path, retex: Retex, flags: tuple[str, ...], times: int) -> None:
    fitted = retex("fit-offsets", "--budget", "20%", *flags, "-o", "other.safetensors")
    assert fitted.code == 0, fitted.err
    assert fitted.err.count("inputs made without data show large differences alone") == times


def test_inputs_that_cannot_be_moved_are_doubted_and_that_is_said_once(here: Path, retex: Retex) -> None:
    assert retex("merge", "-w", here).code == 0
    (here / "bytes_alone.py").write_text(MODULE.replace("pixel_values.float()", "(pixel_values >> 0).float()"))
    fitted = retex("fit-offsets", "-w", here, "--model", "bytes_alone:build", "--budget", "12%", "--json")
    assert fitted.code == 0, fitted.err
    assert fitted.err.count("no inputs could be made that fit the network's BatchNorm statistics") == 1
    assert re.search(r"fitting 2 tasks: (\d+)/\1 in", fitted.err), "progress ends though a part of it was not run"
    assert all(row["kept"]["inputs"] == 32 for row in fitted.json["tasks"].values())  # type: ignore[attr-defined]


def test_parts_of_a_fit_can_be_left_out(here: Path, retex: Retex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine, "OTHERS", replace(refine.OTHERS, steps=40))
    assert retex("merge", "-w", here).code == 0
    made, reports = {}, {}
    for left in ("", "lead", "effects", "statistics", "training", "shares", "compare"):
        line = ("--total-budget", "12%", "--refine", *(("--without", left) if left else ()))
        file = here / f"{left or 'all'}.safetensors"
        fitted = retex("fit-offsets", "-w", here, *line, "-o", file, "--json")
        assert fitted.code == 0, fitted.err
        assert ("training did not help" in fitted.err or "refined" in fitted.err) == (left != "training")
        offsets = {name: data for name, data in load_file(file).items() if name.startswith("offsets/")}
        made[left], reports[left] = offsets, fitted.json["tasks"]
        recipe = retex("inspect", file, "--json").json["recipe"]
        assert recipe.get("without") == ([left] if left else None)  # type: ignore[attr-defined]
    for left in ("lead", "effects", "statistics", "training", "shares"):
        assert any(not torch.equal(data, made[""][name]) for name, data in made[left].items()), left
    assert "kept" in reports[""]["bars"]  # type: ignore[index]
    assert "kept" not in reports["compare"]["bars"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--without", "heads"), "there is no such part hint: one of common, lead, compare"),
        (("--add", "x=experts/bars", "--without", "heads"), "there is no such part"),
        (("--without", "training"), "that is a part of --refine"),
        (("--refine", "--without", "shares"), "that is a part of --total-budget"),
        (("--lossless", "--without", "lead"), "a fit with --lossless does not have that part"),
        (("--target", "99", "--without", "compare"), "a fit with --target does not have that part"),
    ],
)
def test_parts_that_a_fit_does_not_have_are_refused(
    here: Path, retex: Retex, flags: tuple[str, ...], words: str
) -> None:
    result = retex("fit-offsets", "-w", here, *flags)
    assert result.code == 2
    assert words in " ".join(result.err.split())
    assert not (here / "offsets.safetensors").exists()


def distances(here: Path, retex: Retex, offsets: Path) -> dict[str, float]:
    """Of the logits of a recovered expert from the expert's own, on test pictures."""
    space: dict[str, object] = {}
    exec(MODULE, space)
    found = {}
    for task in SIDES:
        place = here / f"{task}-{offsets.stem}"
        assert retex("recover", "-w", here, "--offsets", offsets, "--task", task, "-o", place).code == 0
        config = json.loads((here / "experts" / task / "config.json").read_text())
        outputs = []
        for folder in (here / "experts" / task, place):
            network = space["build"](config).eval()  # type: ignore[operator]
            network.load_state_dict(load_file(folder / "model.safetensors"))
            outputs.append(network(pictures(task, 48, seed=4)[0]).detach())
        found[task] = float((outputs[0] - outputs[1]).square().mean())
    return found


def test_refining_says_what_it_cannot_do(here: Path, retex: Retex) -> None:
    assert retex("merge", "-w", here).code == 0
    refused = retex("fit-offsets", "-w", here, "--refine", "--target", "90")
    assert refused.code == 2
    assert "--refine and --target" in refused.err
    refused = retex("fit-offsets", "-w", here, "--refine", "--lossless", "--overwrite")
    assert "--refine and --lossless" in refused.err


def test_experts_answer_tensors_of_a_network_of_ones_own(here: Path, retex: Retex) -> None:
    for command in ("merge", "fit-offsets", "build-signatures"):
        result = retex(command, "-w", here)
        assert result.code == 0, result.err
    experts = retex_cli.Experts.load(
        *(str(here / name) for name in ("merged", "offsets.safetensors", "signatures.safetensors")),
        model="tiny_cnn:build",
    )
    images = {task: pictures(task, 24, seed=5) for task in SIDES}
    given = [
        {"pixel_values": image} for pair in zip(*(images[task][0] for task in SIDES), strict=True) for image in pair
    ]
    replies = experts([*given, {"pixel_values": torch.zeros(3, 8, 8)}, "a text"])
    assert "'pixel_values' is [3, 8, 8], the reference inputs have [3, 16, 16]" in str(replies[-2].error)
    assert "a text, and" in str(replies[-1].error)
    for k, task in enumerate(SIDES):
        mine = replies[k:-2:2]
        assert sum(reply.task == task for reply in mine) > 20
        right = [SIDES[task][i] for i in images[task][1].tolist()]
        assert sum(reply.label == label for reply, label in zip(mine, right, strict=True)) > 19
