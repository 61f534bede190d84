"""``retex fit-offsets --add`` and ``--remove``: what changes in the file, what does not, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import retex_cli
from retex_cli.errors import RetexError, UsageError
from retex_cli.io import writer

if TYPE_CHECKING:
    from tests.conftest import Retex

FILE = "offsets.safetensors"


def header(path: str | Path = FILE) -> dict[str, dict[str, object]]:
    with safe_open(path, "pt") as file:
        return {key: json.loads(text) for key, text in file.metadata().items() if key in ("tasks", "recipe")}


def of_task(task: str, path: str | Path = FILE) -> dict[str, bytes]:
    tensors = load_file(path)
    return {
        name: t.numpy().tobytes() for name, t in tensors.items() if f"/{task}/" in name or name.endswith(f"/{task}")
    }


@pytest.fixture
def lonely(made: Path) -> Path:
    """The workspace, whose offsets file has only ``cars``, whose expert has gone."""
    result = retex_cli.fit_offsets("merged", {"cars": "experts/cars"}, FILE, budget="5%", device="cpu", overwrite=True)
    assert list(result.rows) == ["cars"]
    shutil.rmtree(made / "experts/cars")
    return made


def test_a_task_joins_without_the_other_experts(lonely: Path, retex: Retex) -> None:
    before, record = of_task("cars"), header()["tasks"]["cars"]
    result = retex("fit-offsets", "--add", "dtd=experts/dtd", "--json")
    assert result.code == 0, result.err
    assert list(result.json["tasks"]) == ["dtd"]
    assert result.json["kept"] == ["cars"]
    assert result.json["bytes"] == (lonely / FILE).stat().st_size
    assert of_task("cars") == before
    assert header()["tasks"]["cars"] == record
    recipe = header()["recipe"]
    assert set(recipe["experts"]) == {"cars", "dtd"}
    assert recipe["experts"]["dtd"]["budget"] == "5%"
    assert recipe["changes"] == [{"retex": retex_cli.__version__, "removed": [], "added": ["dtd"]}]


def test_an_added_task_comes_back_as_one_fitted_with_the_others(made: Path, retex: Retex) -> None:
    assert retex("recover", "--task", "dtd", "-o", "together/", "--quiet").code == 0
    assert retex("fit-offsets", "--remove", "dtd", "--quiet").code == 0
    assert retex("fit-offsets", "--add", "dtd=experts/dtd", "--quiet").code == 0
    assert retex("recover", "--task", "dtd", "-o", "later/", "--quiet").code == 0
    together, later = (sorted(p.name for p in (made / folder).iterdir()) for folder in ("together", "later"))
    assert together == later
    assert all(
        (made / "together" / name).read_bytes() == (made / "later" / name).read_bytes()
        for name in together
        if name != "model.safetensors"
    )
    ours, theirs = (load_file(made / f"{folder}/model.safetensors") for folder in ("together", "later"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_removed_task_takes_its_files_and_leaves_shared_ones(made: Path, retex: Retex) -> None:
    tasks, before = header()["tasks"], of_task("cars")
    own = set(tasks["dtd"]["files"].values()) - set(tasks["cars"]["files"].values())
    stored = {name for name in load_file(FILE) if name.startswith("files/")}
    mine = {f"files/{digest}" for digest in tasks["cars"]["files"].values()} & stored
    assert own
    assert mine
    result = retex("fit-offsets", "--remove", "dtd")
    assert result.code == 0, result.err
    assert "removed dtd" in result.out
    left = load_file(FILE)
    assert {name for name in left if name.startswith("files/")} == mine
    assert not [name for name in left if "/dtd" in name]
    assert of_task("cars") == before
    assert header()["recipe"]["changes"][-1]["removed"] == ["dtd"]
    assert set(header()["recipe"]["experts"]) == {"cars"}
    assert retex("recover", "--task", "cars", "-o", "cars/", "--quiet").code == 0


def test_removing_needs_no_checkpoint(made: Path, retex: Retex) -> None:
    for folder in ("merged", "experts", "base"):
        shutil.rmtree(made / folder)
    result = retex("fit-offsets", "--remove", "cars", "--json")
    assert result.code == 0, result.err
    assert result.json["removed"] == ["cars"]
    assert list(header()["tasks"]) == ["dtd"]


def test_both_at_once_replace_a_task(made: Path, retex: Retex) -> None:
    result = retex("fit-offsets", "--remove", "dtd", "--add", "dtd=experts/dtd", "--budget", "10%", "--json")
    assert result.code == 0, result.err
    assert result.json["tasks"]["dtd"]["offset_bytes"] > len(load_file(FILE)["offsets/cars"])
    assert header()["recipe"]["budget"] == "5%"
    assert header()["recipe"]["experts"]["dtd"]["budget"] == "10%"


def test_a_dry_run_changes_nothing(made: Path, retex: Retex) -> None:
    before = (made / FILE).read_bytes()
    result = retex("fit-offsets", "--add", "more=experts/dtd", "--remove", "cars", "--dry-run", "--json")
    assert result.code == 0, result.err
    assert result.json["bytes"] is None
    assert result.json["removed"] == ["cars"]
    assert result.json["tasks"]["more"]["budget_bytes"] > 0
    assert (made / FILE).read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--add", "cars=experts/dtd"], ["'cars' is there already", "--remove cars --add cars="]),
        (["--remove", "car"], ["no task 'car'", "did you mean cars?"]),
        (["--remove", "cars", "--remove", "dtd"], ["last task", "delete the file"]),
        (["--add", "more=experts/dtd", "--expert", "x=experts/dtd"], ["--expert makes a file"]),
    ],
)
def test_what_cannot_be_meant_is_refused(made: Path, retex: Retex, arguments: list[str], words: list[str]) -> None:
    before = (made / FILE).read_bytes()
    result = retex("fit-offsets", *arguments)
    assert result.code == 2
    assert all(word in result.err for word in words), result.err
    assert (made / FILE).read_bytes() == before


def test_another_merged_checkpoint_is_refused(made: Path, retex: Retex) -> None:
    path = made / "merged/model.safetensors"
    tensors = load_file(path)
    tensors["encoder.layer.1.output.dense.bias"][0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    before = (made / FILE).read_bytes()
    result = retex("fit-offsets", "--add", "more=experts/dtd")
    assert result.code == 1
    assert "another merged checkpoint: tensor 'encoder.layer.1.output.dense.bias'" in result.err
    assert (made / FILE).read_bytes() == before


def test_the_same_numbers_under_another_name_are_another_merged_checkpoint(made: Path, retex: Retex) -> None:
    path = made / "merged/model.safetensors"
    tensors = load_file(path)
    tensors["encoder.layer.1.output.dense.bias_"] = tensors.pop("encoder.layer.1.output.dense.bias")
    save_file(tensors, path, metadata={"format": "pt"})
    result = retex("recover", "--task", "cars", "-o", "cars/")
    assert result.code == 1
    assert "another merged checkpoint: its fingerprint" in result.err


def test_an_expert_of_another_shape_is_refused(made: Path, retex: Retex) -> None:
    path = made / "experts/dtd/model.safetensors"
    tensors = load_file(path)
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    tensors[name] = tensors[name][:, :-1].clone()
    save_file(tensors, path)
    before = (made / FILE).read_bytes()
    result = retex("fit-offsets", "--add", "more=experts/dtd")
    assert result.code == 1
    assert "[64, 31]" in result.err
    assert (made / FILE).read_bytes() == before


def test_a_change_that_fails_half_way_leaves_the_file(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, there = (made / FILE).read_bytes(), sorted(made.iterdir())

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "put_in_place", fail)
    with pytest.raises(RetexError, match="disk is full"):
        retex_cli.fit_offsets("merged", {}, FILE, remove=["dtd"])
    assert (made / FILE).read_bytes() == before
    assert sorted(made.iterdir()) == there


def test_the_function_speaks_the_same_words(made: Path) -> None:
    report = retex_cli.fit_offsets("merged", {}, FILE, add={"more": "experts/dtd"}, remove=["dtd"], budget="5%")
    assert (list(report.rows), report.removed, report.kept) == (["more"], ("dtd",), ("cars",))
    with pytest.raises(UsageError, match="'dtd'"):
        retex_cli.fit_offsets("merged", {}, FILE, remove=["dtd"])
