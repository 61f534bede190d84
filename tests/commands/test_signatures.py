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
