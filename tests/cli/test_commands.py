"""Every command on tiny real models: with flags alone, in a workspace, as JSON, quiet, planned only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

MAKING = ("merge", "fit-offsets", "build-signatures")
ARTEFACTS = {"merge": "merged", "fit-offsets": "offsets.safetensors", "build-signatures": "signatures.safetensors"}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_flags_alone_make_what_a_workspace_makes(made: Path, tiny_models: Path, retex, monkeypatch) -> None:
    in_workspace = files(made)
    outside = made.parent / "outside"
    outside.mkdir()
    for name in ("base", "experts", "data"):
        shutil.copytree(tiny_models / name, outside / name)
    monkeypatch.chdir(outside)
    experts = ("--expert", "dtd=experts/dtd", "--expert", "cars=experts/cars")
    inputs = ("--inputs", "cars=data/cars-inputs.jsonl", "--inputs", "dtd=data/dtd-inputs.jsonl")
    for line in (
        ("merge", "--base", "base", *experts),
        ("fit-offsets", *experts, "--budget", "5%"),
        ("build-signatures", *inputs),
    ):
        result = retex(*line)
        assert result.code == 0, result.err
    assert load_file("merged/model.safetensors").keys() == load_file(made / "merged/model.safetensors").keys()
    assert files(outside / "merged").keys() == files(made / "merged").keys()
    weights = "merged/model.safetensors"
    assert files(outside)[weights] == in_workspace[weights], "the same inputs and options give the same bytes"


def test_json_is_one_object_and_dry_run_writes_nothing(made: Path, retex) -> None:
    before = files(made)
    for line in (
        *((command, "--overwrite") for command in MAKING),
        ("recover", "--task", "cars"),
        ("recover",),
        ("eval",),
        ("identify", "data/cars-inputs.jsonl"),
    ):
        planned = retex(*line, "--dry-run")
        assert planned.code == 0, planned.err
        as_json = retex(*line, "--dry-run", "--json")
        assert isinstance(as_json.json, dict)
        assert files(made) == before, line


@pytest.mark.parametrize("command", MAKING)
def test_quiet_says_nothing_and_works(made: Path, retex, command: str) -> None:
    result = retex(command, "--overwrite", "--quiet")
    assert (result.code, result.out, result.err) == (0, "", "")


@pytest.mark.parametrize("command", MAKING)
def test_progress_goes_to_standard_error_and_the_report_to_standard_output(made: Path, retex, command: str) -> None:
    result = retex(command, "--overwrite")
    assert result.code == 0
    assert " ..." in result.err, "stages are announced in lines where there is no terminal"
    assert "\x1b" not in result.err + result.out
    assert ARTEFACTS[command] in result.out
    assert ARTEFACTS[command] not in [line for line in result.err.splitlines() if line.startswith("wrote")]


def test_making_again_gives_the_same_bytes(made: Path, retex) -> None:
    before = files(made)
    for command, more in zip(MAKING, (("--threads", "1"), ("--threads", "2"), ()), strict=True):
        assert retex(command, "--overwrite", "--quiet", *more).code == 0
    assert files(made) == before


def test_recover_by_task_to_a_file_a_folder_and_all(made: Path, retex) -> None:
    assert retex("recover", "--task", "cars", "-o", "cars.safetensors").code == 0
    result = retex("recover", "--json")
    assert [one["head"] for one in result.json["reports"]] == ["cars", "dtd"]  # type: ignore[attr-defined]
    alone, folder = load_file("cars.safetensors"), load_file("recovered/cars/model.safetensors")
    assert alone.keys() == folder.keys() == load_file("experts/cars/model.safetensors").keys()
    assert all(alone[name].equal(folder[name]) for name in alone)
    assert json.loads(Path("recovered/dtd/config.json").read_text())["id2label"] == {
        "0": "dotted",
        "1": "striped",
        "2": "woven",
    }


def test_recover_by_input_and_by_mix(made: Path, retex) -> None:
    result = retex("recover", "--input", "data/dtd-test.jsonl", "--json")
    assert result.code == 0, result.err
    assert result.json["head"] == "dtd"
    mixed = retex("recover", "--mix", "cars=0.7,dtd=0.3", "-o", "mixed.safetensors", "--json")
    assert (mixed.json["head"], mixed.json["embedding"]) == ("cars", {"cars": 0.7, "dtd": 0.3})


def test_identify_is_right_about_toy_tasks(made: Path, retex) -> None:
    for task in ("cars", "dtd"):
        found = retex("identify", f"data/{task}-test.jsonl", "--json").lines
        right = [one["task"] == task for one in found]
        assert sum(right) > 0.9 * len(right)


def test_eval_gates(made: Path, retex) -> None:
    passed = retex("eval", "--fail-under", "90", "--json", "-o", "eval.json")
    assert passed.code == 0, passed.err
    scores = passed.json
    assert scores == json.loads(Path("eval.json").read_text())
    assert set(scores["tasks"]["cars"]["recovered"]) == {"K", "E", "H"}  # type: ignore[index]
    missed = retex("eval", "--fail-under", "worst=101", "--json")
    assert missed.code == 3
    assert missed.json["tasks"] == scores["tasks"]
    assert missed.json["code"] == 3
    assert "worst" in str(missed.json["error"])
    plain = retex("eval", "--fail-under", "101", "--protocols", "K", "--quiet")
    assert plain.code == 3
    assert plain.err.startswith("error: mean under K")
    assert "cars" in plain.out, "the table is the answer, and is shown all the same"


def test_eval_without_signatures_says_what_it_leaves_out(made: Path, retex) -> None:
    Path("signatures.safetensors").unlink()
    result = retex("eval", "--json")
    assert set(result.json["tasks"]["cars"]["recovered"]) == {"K"}  # type: ignore[index]
    assert "protocol K only" in result.err


@pytest.mark.parametrize("artefact", ARTEFACTS.values())
def test_inspect_tells_how_each_artefact_was_made(made: Path, retex, artefact: str) -> None:
    found = retex("inspect", artefact, "--json").json
    commands = {"merged": "merge", "offsets.safetensors": "fit-offsets", "signatures.safetensors": "build-signatures"}
    assert found["recipe"]["command"] == commands[artefact]  # type: ignore[index]
    assert str(found["format"]).startswith("retex.")
    assert found["retex_version"] is not None
    assert set(found["tasks"]) == (set() if artefact == "merged" else {"cars", "dtd"})  # type: ignore[arg-type]
    assert "made by retex" in retex("inspect", artefact).out
