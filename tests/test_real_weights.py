"""The whole job once on real weights and real text: two experts of MiniLM, tuned for a few steps, brought back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

if TYPE_CHECKING:
    from tests.conftest import Retex

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("sms_spam", "election")
TEST_ROWS = 150


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace of the demo's own making, with experts of thirty steps instead of hundreds."""
    folder = tmp_path_factory.mktemp("real")
    make = ROOT / "examples" / "suites" / "make.py"
    command = [sys.executable, str(make), "text4", str(folder), "--tasks", *TASKS, "--steps", "30", "--samples", "64"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for task in TASKS:
        path = folder / f"data/{task}-test.jsonl"
        path.write_text("\n".join(path.read_text().splitlines()[:TEST_ROWS]) + "\n")
    return folder


def test_two_real_experts_come_back(suite: Path, retex: Retex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(suite)
    for command in (["merge"], ["fit-offsets", "--budget", "0.5%"], ["build-signatures"]):
        result = retex(*command, "--quiet")
        assert result.code == 0, result.err
    merged = load_file("merged/model.safetensors")
    assert "embeddings.word_embeddings.weight" in merged  # the bare encoder's names, not the classifiers'
    result = retex("eval", "--json")
    assert result.code == 0, result.err
    for task in TASKS:
        entry = result.json["tasks"][task]
        assert entry["agreement"]["K"] > 0.95
        assert entry["identified"] > 0.9
        assert entry["offset_bytes"] <= 0.005 * entry["expert_bytes"]
    mean = result.json["mean"]
    assert mean["normalised"]["K"] > 0.97
    assert mean["agreement"]["K"] > mean["agreement"]["merged"]
    assert retex("recover", "--task", "election", "-o", "back/").code == 0
    model = AutoModelForSequenceClassification.from_pretrained("back")
    assert sorted(model.config.label2id) == ["HillaryClinton", "realDonaldTrump"]
    identified = retex("identify", f"data/{TASKS[0]}-test.jsonl", "--json").lines
    assert len(identified) == TEST_ROWS


def test_the_tests_rows_are_in_no_other_file(suite: Path) -> None:
    for task in TASKS:
        reference, test = (
            {json.loads(line)["text"] for line in (suite / f"data/{task}-{side}.jsonl").read_text().splitlines()}
            for side in ("reference", "test")
        )
        assert reference
        assert not reference & test
