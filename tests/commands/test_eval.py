"""``retex eval``: the promised JSON, the three protocols, gates as exit status, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import TASKS
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from retex_cli import Experts, Predictor
from retex_cli.commands.eval_report import EvalReport
from retex_cli.evaluation.protocols import TaskAnswers

if TYPE_CHECKING:
    from tests.conftest import Retex


def test_the_json_object_and_its_numbers(made: Path, retex: Retex) -> None:
    result = retex("eval", "--json", "-o", "eval.json", "--logits", "logits.safetensors")
    assert result.code == 0, result.err
    report = result.json
    assert json.loads(Path("eval.json").read_text()) == report
    logits = load_file("logits.safetensors")
    for task in ("cars", "dtd"):
        entry = report["tasks"][task]
        rows = [json.loads(line) for line in Path(f"data/{task}-test.jsonl").read_text().splitlines()]
        names = json.loads(Path(f"experts/{task}/config.json").read_text())["id2label"]
        for key, name in (("expert", "expert"), ("merged", "merged")):
            answers = [names[str(i)] for i in logits[f"{task}/{name}"].argmax(-1).tolist()]
            assert entry[key] == pytest.approx(
                sum(a == row["label"] for a, row in zip(answers, rows, strict=True)) / len(rows)
            )
        assert set(entry["recovered"]) == {"K", "E", "H"}
        assert entry["normalised"]["K"] == pytest.approx(entry["recovered"]["K"] / entry["expert"])
        assert entry["expert_bytes"] == Path(f"experts/{task}/model.safetensors").stat().st_size
        assert 0 < entry["offset_bytes"] < entry["expert_bytes"]
        assert entry["identified"] > 0.9
        same = (logits[f"{task}/K"].argmax(-1) == logits[f"{task}/expert"].argmax(-1)).float().mean().item()
        assert entry["agreement"]["K"] == pytest.approx(same)
    assert report["mean"]["normalised"]["K"] > report["mean"]["normalised"]["merged"]
    assert report["files"]["offsets.safetensors"] == Path("offsets.safetensors").stat().st_size
    assert report["files"]["merged/"] >= Path("merged/model.safetensors").stat().st_size


def test_tasks_and_answers_stand_apart_with_their_intervals(made: Path, retex: Retex) -> None:
    result = retex("eval", "-o", "eval.json", "--picture", "confusion.svg", "--json")
    assert result.code == 0, result.err
    report = result.json
    for task, other in (("cars", "dtd"), ("dtd", "cars")):
        entry, counts = report["tasks"][task], report["confusion"]["counts"][task]
        assert counts[task] == pytest.approx(48 * entry["identified"])
        assert counts[other] == 48 - counts[task]
        assert report["confusion"]["unknown"][task] == pytest.approx(48 * entry["unknown"])
        assert entry["with_unknown"]["task"] <= entry["identified"]
        assert entry["of_known"]["H"] == pytest.approx(entry["recovered"]["H"] / entry["recovered"]["K"])
    for entry in (*report["tasks"].values(), report["mean"]):
        for figure, (low, high) in entry["intervals"].items():
            value = entry
            for name in figure.split("."):
                value = value[name]
            assert low - 1e-9 <= value <= high + 1e-9, figure
    assert Path("confusion.svg").read_text().count(" inputs</title>") == 6
    shown = retex("eval").out
    for words in ("mean, unknown is wrong", "taken for", "95 % intervals", "of protocol K"):
        assert words in shown


def test_wrong_identification_costs_under_e_and_h_and_not_under_k(made: Path, retex: Retex) -> None:
    """Test inputs of one task that read like the other's are sent to the other expert, whose labels are never right."""
    rows = [json.loads(line) for line in Path("data/dtd-test.jsonl").read_text().splitlines()]
    sent = [{"text": row["text"], "label": "fast"} for row in rows]
    Path("data/cars-test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sent))
    result = retex("eval", "--json")
    assert result.code == 0, result.err
    cars = result.json["tasks"]["cars"]
    assert cars["identified"] < 0.1
    assert cars["recovered"]["H"] < 0.1  # answers are label names, and dtd has no label "fast"
    assert cars["recovered"]["K"] > cars["recovered"]["H"]


@pytest.mark.parametrize("options", [(), ("--no-blend",)])
def test_what_eval_scores_is_what_serving_answers(
    made: Path, retex: Retex, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    """Inputs of both tasks' words, most of them unsure; under E all experts answer with the head of cars."""
    monkeypatch.setattr("retex_cli.signatures.signatures.UNSURE", 0.999)
    monkeypatch.setattr("retex_cli.models.network.has_fast_bf16", lambda device: False)
    rows = [json.loads(line) for task in TASKS for line in Path(f"data/{task}-test.jsonl").read_text().splitlines()]
    pairs = [f"{one['text']} {other['text']}" for one, other in zip(rows[:48], rows[:47:-1], strict=True)]
    write_tests([{"text": text, "label": "fast"} for text in pairs])
    seen: dict[str, TaskAnswers] = {}
    made_of = EvalReport.of

    def spy(answers: Sequence[TaskAnswers], *rest: object, **more: object) -> EvalReport:
        seen.update({given.task: given for given in answers})
        return made_of(answers, *rest, **more)

    monkeypatch.setattr(EvalReport, "of", spy)
    assert retex("eval", "--json", *options).code == 0
    served = Experts.load("merged", "offsets.safetensors", "signatures.safetensors", blend=not options)(pairs)
    assert seen["cars"].recovered["H"].tolist() == [reply.label for reply in served]
    shares = [reply.shares for reply in served]
    several = [k for k, mine in enumerate(shares) if len(mine) == 2]
    assert len(several) > 20 if not options else not several
    model, said = AutoModelForSequenceClassification.from_pretrained("experts/cars").eval(), {}
    tokenizer, predictor = AutoTokenizer.from_pretrained("merged"), Predictor.load("merged", "offsets.safetensors")
    for task in TASKS:
        predictor.apply_(model, task, head="cars")
        with torch.no_grad():
            said[task] = [model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(0) for text in pairs]
    mixes = [sum(share * said[task][k] for task, share in mine.items()) for k, mine in enumerate(shares)]
    assert seen["cars"].recovered["E"].tolist() == [model.config.id2label[int(mix.argmax())] for mix in mixes]
    assert (seen["cars"].recovered["E"] != seen["cars"].recovered["K"]).any()


@pytest.mark.parametrize(("gate", "code"), [("10", 0), ("worst=10,H=10", 0), ("100.5", 3), ("worst=101,K=1", 3)])
def test_gates(made: Path, retex: Retex, gate: str, code: int) -> None:
    result = retex("eval", "--fail-under", gate, "--json", "-o", "eval.json")
    assert result.code == code, result.err
    assert Path("eval.json").exists()
    if code:
        assert "of the experts' accuracy, wanted" in result.out + result.err


def test_protocol_k_needs_no_signatures(made: Path, retex: Retex) -> None:
    Path("signatures.safetensors").unlink()
    result = retex("eval", "--protocols", "K", "--json")
    assert result.code == 0, result.err
    assert set(result.json["tasks"]["cars"]["recovered"]) == {"K"}
    assert result.json["tasks"]["cars"]["identified"] is None


def test_offsets_of_another_merged_checkpoint_are_refused_under_k_too(made: Path, retex: Retex) -> None:
    tensors = load_file("merged/model.safetensors")
    tensors["pooler.dense.bias"][0] += 1e-3
    save_file(tensors, "merged/model.safetensors", metadata={"format": "pt"})
    result = retex("eval", "--protocols", "K")
    assert result.code == 1
    assert "belongs to another merged checkpoint: tensor 'pooler.dense.bias'" in result.err


def write_tests(rows: list[dict[str, object]]) -> None:
    Path("data/cars-test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_labels_outside_the_head_are_refused(made: Path, retex: Retex) -> None:
    write_tests([{"text": "car", "label": "fast"}, {"text": "car", "label": "purple"}])
    result = retex("eval")
    assert result.code == 1
    assert "cars-test.jsonl:2" in result.err
    assert "'purple' is outside the head of task 'cars'" in result.err
    assert "fast" in result.err


def test_unlabelled_and_empty_tests_are_refused(made: Path, retex: Retex) -> None:
    write_tests([{"text": "car"}])
    assert "no label" in retex("eval").err
    write_tests([])
    result = retex("eval")
    assert result.code == 1
    assert "cars-test.jsonl: holds no inputs" in result.err


def test_signatures_of_another_merged_checkpoint_are_refused(made: Path, retex: Retex) -> None:
    result = retex("build-signatures", "--merged", "base", "--overwrite")
    assert result.code == 0, result.err
    result = retex("eval")
    assert result.code == 1
    assert "signatures.safetensors: built on another encoder" in result.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fail-under", "high"], ["'high' is not a number"]),
        (["--fail-under", "best=3"], ["unknown name 'best'"]),
        (["--protocols", "K,Z"], ["Z"]),
        (["--protocols", "K", "--fail-under", "H=9"], ["protocol H is not run"]),
        (["--protocols", "E,H", "--fail-under", "worst=9"], ["protocol K is not run"]),
        (["--picture", "a.pdf"], ["a.pdf", "SVG"]),
        (["--picture", "a.svg", "--protocols", "K"], ["identifies none"]),
    ],
)
def test_wrong_usage(made: Path, retex: Retex, arguments: list[str], words: list[str]) -> None:
    result = retex("eval", *arguments)
    assert result.code == 2, result.err
    for word in words:
        assert word in result.err
