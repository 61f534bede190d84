"""``retex recover``: from three artefacts alone, in every way of saying which expert, and what is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from retex_cli.models.device import has_fast_bf16

if TYPE_CHECKING:
    from tests.conftest import Retex

ARTEFACTS = ("merged", "offsets.safetensors", "signatures.safetensors")


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return sum((a[name].float() - b[name].float()).square().sum().item() for name in a)


@pytest.fixture
def alone(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Only the three artefacts: base and experts are gone, and so is the network."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name in ARTEFACTS:
        (made / name).rename(folder / name)
    shutil.rmtree(made)
    monkeypatch.chdir(folder)

    def refuse(*_: object) -> None:
        raise OSError("the network is gone")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return folder


def test_every_task_from_the_artefacts_alone(tiny_models: Path, alone: Path, retex: Retex) -> None:
    merged = load_file("merged/model.safetensors")
    for task in ("cars", "dtd"):
        result = retex("recover", "--task", task, "-o", f"{task}/")
        assert result.code == 0, result.err
        expert = load_file(tiny_models / "experts" / task / "model.safetensors")
        back = load_file(f"{task}/model.safetensors")
        before = sum((expert[f"bert.{n}"] - merged[n]).square().sum().item() for n in merged if f"bert.{n}" in expert)
        assert distance(back, expert) < 0.5 * before
        assert {n: t.dtype for n, t in back.items()} == {n: t.dtype for n, t in expert.items()}
        model = AutoModelForSequenceClassification.from_pretrained(task)
        assert (
            model.config.label2id == json.loads((tiny_models / f"experts/{task}/config.json").read_text())["label2id"]
        )
        assert AutoTokenizer.from_pretrained(task)("car seat")["input_ids"]


def test_transformers_gives_the_logits_that_eval_measured(made: Path, retex: Retex) -> None:
    assert retex("eval", "--logits", "logits.safetensors", "--quiet").code == 0
    assert retex("recover", "--quiet").code == 0
    measured = load_file("logits.safetensors")
    for task in ("cars", "dtd"):
        texts = [json.loads(line)["text"] for line in (made / f"data/{task}-test.jsonl").read_text().splitlines()]
        model = AutoModelForSequenceClassification.from_pretrained(f"recovered/{task}").eval()
        tokenizer = AutoTokenizer.from_pretrained(f"recovered/{task}")
        fast = has_fast_bf16(torch.device("cpu"))
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=fast):
            logits = model(**tokenizer(texts, padding=True, truncation=True, return_tensors="pt")).logits.float()
        tolerance = 0.05 if fast else 1e-4
        torch.testing.assert_close(logits, measured[f"{task}/K"], atol=tolerance, rtol=tolerance)
        assert not torch.allclose(logits, measured[f"{task}/merged"], atol=tolerance, rtol=tolerance)


def test_a_larger_budget_is_nearer_and_the_largest_is_there(made: Path, retex: Retex) -> None:
    expert = load_file("experts/dtd/model.safetensors")
    before = float("inf")
    for budget in ("2%", "5%", "20%", "200%"):
        assert retex("fit-offsets", "--budget", budget, "--overwrite", "--quiet").code == 0
        assert retex("recover", "--task", "dtd", "-o", "dtd.safetensors", "--overwrite", "--quiet").code == 0
        lost = distance(load_file("dtd.safetensors"), expert)
        assert lost < before
        before = lost
    assert before < 1e-6


def test_recovering_twice_is_recovering_once(made: Path, retex: Retex) -> None:
    outputs = []
    for threads in ("1", "4"):
        assert retex("recover", "--task", "cars", "-o", "a.safetensors", "--threads", threads, "--overwrite").code == 0
        outputs.append(Path("a.safetensors").read_bytes())
    assert outputs[0] == outputs[1]


def test_file_folder_shards_and_stdout_hold_the_same(made: Path) -> None:
    command = [sys.executable, "-m", "retex_cli", "recover", "--task", "cars", "--quiet"]
    streamed = subprocess.run([*command, "-o", "-"], check=True, capture_output=True).stdout
    for extra in (["-o", "cars.safetensors"], ["-o", "cars/", "--max-shard-size", "20KB"]):
        subprocess.run([*command, *extra], check=True)
    whole = load_file("cars.safetensors")
    index = json.loads(Path("cars/model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    shards = {name: load_file(f"cars/{file}")[name] for name, file in index.items()}
    assert distance(shards, whole) == 0
    assert distance(load(streamed), whole) == 0
    model = AutoModelForSequenceClassification.from_pretrained("cars")
    assert torch.equal(model.state_dict()["classifier.weight"], whole["classifier.weight"])


def test_output_mode_follows_the_umask(made: Path, retex: Retex) -> None:
    old = os.umask(0o027)
    try:
        assert retex("recover", "--task", "cars", "-o", "cars.safetensors").code == 0
    finally:
        os.umask(old)
    assert stat.S_IMODE(Path("cars.safetensors").stat().st_mode) == 0o640


def test_a_mix_lies_between(made: Path, retex: Retex) -> None:
    for task in ("cars", "dtd"):
        assert retex("recover", "--task", task, "-o", f"{task}.safetensors", "--quiet").code == 0
    result = retex("recover", "--mix", "cars=0.75,dtd=0.25", "-o", "mix.safetensors", "--json")
    assert result.code == 0, result.err
    assert result.json["head"] == "cars"
    cars, dtd, mix = (load_file(f"{name}.safetensors") for name in ("cars", "dtd", "mix"))
    name = "bert.encoder.layer.0.output.dense.weight"
    torch.testing.assert_close(mix[name], 0.75 * cars[name] + 0.25 * dtd[name], atol=1e-5, rtol=1e-4)
    assert torch.equal(mix["classifier.weight"], cars["classifier.weight"])
    assert retex("recover", "--mix", "cars=0.75,dtd=0.25", "--head", "dtd", "-o", "other.safetensors").code == 0
    assert torch.equal(load_file("other.safetensors")["classifier.weight"], dtd["classifier.weight"])


def test_inputs_are_identified_and_it_says_how_sure(alone: Path, tiny_models: Path, retex: Retex) -> None:
    for task in ("cars", "dtd"):
        shutil.copy(tiny_models / f"data/{task}-test.jsonl", "inputs.jsonl")
        result = retex("recover", "--input", "inputs.jsonl", "-o", f"{task}.safetensors", "--json")
        assert result.code == 0, result.err
        found = result.json["identified"]
        assert found["task"] == result.json["head"] == task
        assert found["probability"] > 0.9
        assert retex("recover", "--task", task, "-o", "named.safetensors", "--overwrite").code == 0
        assert distance(load_file(f"{task}.safetensors"), load_file("named.safetensors")) == 0


def test_soft_recovery_mixes_by_how_well_experts_fit(made: Path, retex: Retex) -> None:
    result = retex(
        "recover", "--task", "auto", "--soft", "--input", "data/cars-test.jsonl", "-o", "soft.safetensors", "--json"
    )
    assert result.code == 0, result.err
    embedding = result.json["embedding"]
    assert sum(embedding.values()) == pytest.approx(1)
    assert max(embedding, key=embedding.get) == "cars"


def test_dtype_is_the_experts_or_what_is_asked_for(made: Path, retex: Retex) -> None:
    assert retex("recover", "--task", "cars", "--dtype", "bf16", "-o", "half.safetensors").code == 0
    assert {tensor.dtype for tensor in load_file("half.safetensors").values()} == {torch.bfloat16}


def test_dry_run_writes_nothing(made: Path, retex: Retex) -> None:
    result = retex("recover", "--task", "cars", "-o", "cars.safetensors", "--dry-run", "--json")
    assert result.code == 0
    assert result.json["tensors"] == len(load_file("experts/cars/model.safetensors"))
    assert not Path("cars.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--task", "card"], 2, ["no task 'card'", "did you mean cars"]),
        (["--task", "cars", "--mix", "cars=1"], 2, ["exactly one way"]),
        (["--mix", "cars=0.5,dtd=0.6"], 2, ["sum to 1.1"]),
        (["--mix", "cars=0.5,dtx=0.5"], 2, ["no task 'dtx'", "dtd"]),
        (["--task", "auto"], 2, ["--input"]),
        (["--task", "cars", "--head", "nobody"], 2, ["no task 'nobody'"]),
        (["--input", "missing.jsonl"], 1, ["missing.jsonl", "no such file"]),
        (["--task", "cars", "--device", "tpu"], 2, ["tpu", "cuda"]),
    ],
)
def test_unclear_requests_are_refused(
    made: Path, retex: Retex, arguments: list[str], code: int, words: list[str]
) -> None:
    result = retex("recover", *arguments, "-o", "out.safetensors")
    assert result.code == code, result.err
    for word in words:
        assert word in result.err
    assert not Path("out.safetensors").exists()


def test_offsets_of_another_merged_checkpoint_are_refused_and_nothing_lands(made: Path, retex: Retex) -> None:
    tensors = load_file("merged/model.safetensors")
    tensors["encoder.layer.1.output.dense.weight"][0, 0] += 1e-4
    save_file(tensors, "merged/model.safetensors", metadata={"format": "pt"})
    for output in ("out.safetensors", "out/", "-"):
        result = retex("recover", "--task", "cars", "-o", output)
        assert result.code == 1
        assert "offsets.safetensors: belongs to another merged checkpoint" in result.err
        assert "encoder.layer.1.output.dense.weight" in result.err
        assert "merged" in result.err
        assert result.out == ""
    assert not Path("out.safetensors").exists()
    assert not Path("out").exists()


def test_damage_is_pinned_to_its_task_and_the_others_still_recover(made: Path, retex: Retex) -> None:
    data = bytearray(Path("offsets.safetensors").read_bytes())
    size = int.from_bytes(data[:8], "little")
    start, end = json.loads(data[8 : 8 + size])["offsets/cars"]["data_offsets"]
    data[8 + size + (start + end) // 2] ^= 0x40
    Path("offsets.safetensors").write_bytes(data)
    result = retex("recover", "--task", "cars", "-o", "cars.safetensors")
    assert result.code == 1
    assert "the offsets of task 'cars' are damaged" in result.err
    assert not Path("cars.safetensors").exists()
    assert retex("recover", "--task", "dtd", "-o", "dtd.safetensors").code == 0


def rewrite_header(path: Path, change: dict[str, str]) -> None:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"].update(change)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    out = io.BytesIO()
    out.write(len(text).to_bytes(8, "little") + text + data[8 + size :])
    path.write_bytes(out.getvalue())


def test_unknown_format_versions_are_refused(made: Path, retex: Retex) -> None:
    rewrite_header(Path("offsets.safetensors"), {"format_version": "99"})
    result = retex("recover", "--task", "cars", "-o", "cars.safetensors")
    assert result.code == 1
    assert "version 99" in result.err
    assert "offsets.safetensors" in result.err


def test_a_checkpoint_given_as_offsets_is_refused(made: Path, retex: Retex) -> None:
    result = retex("recover", "--task", "cars", "--offsets", "merged/model.safetensors", "-o", "cars.safetensors")
    assert result.code == 1
    assert "not a retex.offsets file" in result.err


def test_failures_are_json_objects_when_asked_for(made: Path, retex: Retex) -> None:
    result = retex("recover", "--task", "card", "-o", "out.safetensors", "--json")
    assert result.json["code"] == result.code == 2
    assert "card" in str(result.json["error"])


@pytest.mark.parametrize(
    ("text", "gate", "code"),
    [
        ("the engine of a rapid car", "0.6", 0),
        ("the engine of a rapid car", "1", 3),
        ("car car car car car car car car", "0", 3),
    ],
)
def test_a_decision_that_is_not_sure_enough_is_refused(
    made: Path, retex: Retex, text: str, gate: str, code: int
) -> None:
    given = ("recover", "--input", text, "--min-confidence", gate, "-o", "out.safetensors")
    result = retex(*given, "--json")
    assert result.code == code, result.err
    assert Path("out.safetensors").exists() == (code == 0)
    assert result.json["identified"]["task"] == "cars"
    if code:
        assert (result.json["code"], result.json["tensors"]) == (3, 0)
        assert "nothing is written" in result.json["error"]
        assert "% sure" in retex(*given).err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--task", "cars", "--min-confidence", "0.9"), "--input FILE"),
        (("--input", "a car", "--min-confidence", "95"), "no probability"),
    ],
)
def test_a_confidence_that_cannot_be_meant(made: Path, retex: Retex, given: tuple[str, ...], words: str) -> None:
    result = retex("recover", *given, "-o", "out.safetensors")
    assert result.code == 2
    assert words in result.err


def test_one_bad_input_of_several_writes_no_expert(made: Path, retex: Retex) -> None:
    Path("mixed.jsonl").write_text('{"text": "a car"}\n{"text": ""}\n')
    result = retex("recover", "--input", "mixed.jsonl", "-o", "out.safetensors")
    assert result.code == 1
    assert "mixed.jsonl:2: the text is ''" in result.err
    assert not Path("out.safetensors").exists()
