"""``retex build-signatures`` and ``retex identify``: features of the merged model, the published preset, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from safetensors import safe_open

if TYPE_CHECKING:
    from tests.conftest import Retex


def test_identify_names_the_task_of_each_input(made: Path, retex: Retex) -> None:
    for task in ("cars", "dtd"):
        result = retex("identify", f"data/{task}-test.jsonl", "--json")
        assert result.code == 0, result.err
        found = result.lines
        assert len(found) == 48
        assert sum(entry["task"] == task for entry in found) >= 44
        for entry in found:
            assert 0 <= entry["probability"] <= 1
            assert sum(entry["embedding"].values()) == pytest.approx(1, abs=1e-5)


def test_identify_takes_texts_and_files_together(made: Path, retex: Retex) -> None:
    result = retex("identify", "the engine of a rapid car", "data/dtd-inputs.jsonl", "--json")
    assert result.code == 0, result.err
    assert len(result.lines) == 49
    assert result.lines[0]["task"] == "cars"


def test_the_signature_file_says_how_it_was_made_and_stores_no_input(made: Path) -> None:
    with safe_open("signatures.safetensors", "pt") as file:
        header = dict(file.metadata())
    assert header["format"] == "retex.signatures"
    features = json.loads(header["features"])
    assert features["merged"] is True
    assert features["max_length"] == 32
    assert len(features["fingerprint"]) == 64
    content = Path("signatures.safetensors").read_bytes()
    assert b"engine" not in content


def test_the_published_preset_reads_the_base(made: Path, retex: Retex) -> None:
    result = retex("build-signatures", "--preset", "sim", "--overwrite", "--json")
    assert result.code == 0, result.err
    assert result.json["encoder"].endswith("base")
    result = retex("identify", "data/cars-test.jsonl", "--json")
    assert result.code == 0, result.err
    assert sum(entry["task"] == "cars" for entry in result.lines) >= 40


def test_the_preset_without_a_base_is_wrong_usage(made: Path, retex: Retex) -> None:
    text = Path("retex.toml").read_text().replace('base = "base"', "")
    Path("retex.toml").write_text(text)
    result = retex("build-signatures", "--preset", "sim", "--overwrite")
    assert result.code == 2
    assert "--base" in result.err


def test_too_few_inputs_are_refused(made: Path, retex: Retex) -> None:
    lines = Path("data/cars-inputs.jsonl").read_text().splitlines()[:20]
    Path("data/cars-inputs.jsonl").write_text("\n".join(lines))
    result = retex("build-signatures", "--overwrite")
    assert result.code == 1
    assert "20 inputs for task 'cars', at least 32" in result.err


def test_samples_of_the_workspace_are_as_many_as_there_are(made: Path, retex: Retex) -> None:
    """A number in ``retex.toml`` stands for all tasks, and one with fewer inputs gives what it has."""
    lines = Path("data/cars-inputs.jsonl").read_text().splitlines()[:40]
    Path("data/cars-inputs.jsonl").write_text("\n".join(lines))
    Path("retex.toml").write_text(Path("retex.toml").read_text() + "\n[signatures]\nsamples = 44\nmax_length = 32\n")
    result = retex("build-signatures", "--overwrite", "--json")
    assert result.code == 0, result.err
    assert {task: row["inputs"] for task, row in result.json["tasks"].items()} == {"cars": 40, "dtd": 44}
    assert "fewer than 44 inputs, all of them are used: cars 40" in result.err


def test_samples_that_were_typed_are_wanted(made: Path, retex: Retex) -> None:
    result = retex("build-signatures", "--overwrite", "--samples", "200")
    assert result.code == 1
    assert "48 inputs for task 'cars', at least 200" in result.err
    assert "smaller --samples" in result.err


def test_a_newcomer_may_have_fewer_inputs_than_the_workspace_asks_for(made: Path, retex: Retex) -> None:
    Path("retex.toml").write_text(Path("retex.toml").read_text() + "\n[signatures]\nsamples = 200\n")
    result = retex("build-signatures", "--remove", "dtd", "--add", "dtd", "--json")
    assert result.code == 0, result.err
    assert result.json["tasks"]["dtd"]["inputs"] == 48
    assert "fewer than 200 inputs, all of them are used: dtd 48" in result.err


@pytest.mark.parametrize(("line", "words"), [("{broken", "not valid JSON"), ('{"text": ""}', "the text is ''")])
def test_unreadable_inputs_are_refused_with_their_line(made: Path, retex: Retex, line: str, words: str) -> None:
    path = Path("data/cars-inputs.jsonl")
    path.write_text(path.read_text() + line + "\n")
    before = Path("signatures.safetensors").read_bytes()
    result = retex("build-signatures", "--overwrite")
    assert result.code == 1
    assert "cars-inputs.jsonl:49" in result.err
    assert words in result.err
    assert Path("signatures.safetensors").read_bytes() == before


def test_the_same_inputs_give_the_same_file(made: Path, retex: Retex) -> None:
    before = Path("signatures.safetensors").read_bytes()
    assert retex("build-signatures", "--overwrite").code == 0
    assert Path("signatures.safetensors").read_bytes() == before


def test_a_bare_merged_file_cannot_give_features(made: Path, retex: Retex) -> None:
    Path("merged/model.safetensors").rename("merged.safetensors")
    result = retex("build-signatures", "--merged", "merged.safetensors", "--overwrite")
    assert result.code == 1
    assert "merged.safetensors: no config.json" in result.err
    assert "retex merge -o merged/" in result.err


def inputs_of_birds() -> None:
    """A third task: sentences of its own."""
    lines = [json.dumps({"text": f"the {a} bird sings at {b}"}) for a in "small red old shy".split() for b in range(12)]
    Path("data/birds-inputs.jsonl").write_text("\n".join(lines))


def test_a_task_joins_without_the_others_inputs_and_leaves(made: Path, retex: Retex) -> None:
    before = Path("signatures.safetensors").read_bytes()
    inputs_of_birds()
    for task in ("cars", "dtd"):
        Path(f"data/{task}-inputs.jsonl").unlink()
    result = retex("build-signatures", "--add", "birds=data/birds-inputs.jsonl", "--json")
    assert result.code == 0, result.err
    assert list(result.json["tasks"]) == ["birds", "cars", "dtd"]
    assert result.json["tasks"]["birds"]["inputs"] == 48
    with safe_open("signatures.safetensors", "pt") as file:
        recipe = json.loads(file.metadata()["recipe"])
    assert recipe["inputs"]["birds"]["file"] == "birds-inputs.jsonl"
    assert recipe["inputs"]["cars"]["file"] == "cars-inputs.jsonl"
    assert b"sings" not in Path("signatures.safetensors").read_bytes()
    found = retex("identify", "data/birds-inputs.jsonl", "data/cars-test.jsonl", "--json").lines
    assert sum(entry["task"] == "birds" for entry in found[:48]) >= 46
    assert sum(entry["task"] == "cars" for entry in found[48:]) >= 44
    assert retex("build-signatures", "--remove", "birds").code == 0
    assert Path("signatures.safetensors").read_bytes() == before


def test_a_joined_file_scores_as_a_joint_build_of_the_same_choices(made: Path, retex: Retex) -> None:
    with safe_open("signatures.safetensors", "pt") as file:
        before = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    given = retex("identify", "data/cars-test.jsonl", "data/dtd-test.jsonl", "--json").lines
    assert retex("build-signatures", "--remove", "dtd", "--add", "dtd").code == 0  # its inputs are in the workspace
    with safe_open("signatures.safetensors", "pt") as file:
        after = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        if not name.endswith("calibration"):
            assert tensor.equal(after[name]), name
    again = retex("identify", "data/cars-test.jsonl", "data/dtd-test.jsonl", "--json").lines
    assert [entry["task"] for entry in again] == [entry["task"] for entry in given]
    assert [entry["margin"] for entry in again] == [entry["margin"] for entry in given]


@pytest.mark.parametrize(
    ("typed", "code", "words"),
    [
        (["--add", "cars=data/cars-inputs.jsonl"], 1, "--remove cars --add cars=data/cars-inputs.jsonl"),
        (["--remove", "crs"], 1, "no signature of task 'crs'"),
        (["--remove", "cars", "--remove", "dtd"], 1, "the only one"),
        (["--add", "birds"], 2, "--add birds=FILE"),
        (["--add", "birds=data/none.jsonl"], 1, "data/none.jsonl"),
        (["--remove", "cars", "--preset", "sim"], 2, "--preset does not go with --add"),
        (["--remove", "cars", "-o", "elsewhere.safetensors"], 1, "elsewhere.safetensors: no such file"),
    ],
)
def test_changes_that_cannot_be_meant_leave_the_file_alone(
    made: Path, retex: Retex, typed: list[str], code: int, words: str
) -> None:
    before = Path("signatures.safetensors").read_bytes()
    result = retex("build-signatures", *typed)
    assert result.code == code, result.err
    assert words in result.err
    assert Path("signatures.safetensors").read_bytes() == before


def test_joining_needs_the_network_the_file_was_built_on(made: Path, retex: Retex) -> None:
    inputs_of_birds()
    result = retex("build-signatures", "--add", "birds=data/birds-inputs.jsonl", "--merged", "base")
    assert result.code == 1
    assert "built on another encoder" in result.err
    plan = retex("build-signatures", "--add", "birds=data/birds-inputs.jsonl", "--dry-run", "--json").json
    assert plan["tasks"] == {"birds": {"inputs": 48}, "cars": {"inputs": 48}, "dtd": {"inputs": 48}}


def test_the_library_changes_signatures_too(made: Path) -> None:
    import retex_cli

    report = retex_cli.change_signatures("merged", "signatures.safetensors", remove=["dtd"])
    assert list(report.to_json()["tasks"]) == ["cars"]
