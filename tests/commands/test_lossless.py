"""``retex fit-offsets --lossless``: the expert comes back bit for bit, or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import retex_cli
from retex_cli.commands.offsets_file import OffsetsFile
from retex_cli.io.checkpoint import open_checkpoint
from retex_cli.io.provenance import checkpoint_fingerprint
from retex_cli.offsets import fixed

if TYPE_CHECKING:
    from tests.conftest import Retex

FILE = "exact.safetensors"


@pytest.fixture(scope="module")
def exact_artefacts(tiny_artefacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace with ``exact.safetensors``: ``cars`` without loss, ``dtd`` added within a budget."""
    folder = tmp_path_factory.mktemp("exact") / "workspace"
    shutil.copytree(tiny_artefacts, folder)
    merged, file = str(folder / "merged"), str(folder / FILE)
    retex_cli.fit_offsets(merged, {"cars": str(folder / "experts/cars")}, file, lossless=True, device="cpu")
    retex_cli.fit_offsets(merged, {}, file, add={"dtd": str(folder / "experts/dtd")}, budget="5%", device="cpu")
    return folder


@pytest.fixture
def exact(exact_artefacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy of it; the current directory lies in it."""
    folder = tmp_path / "workspace"
    shutil.copytree(exact_artefacts, folder)
    monkeypatch.chdir(folder)
    return folder


def same_bits(a: str | Path, b: str | Path) -> bool:
    ours, theirs = open_checkpoint(a), open_checkpoint(b)
    return checkpoint_fingerprint(ours) == checkpoint_fingerprint(theirs)


def test_the_expert_comes_back_bit_for_bit(exact: Path, retex: Retex) -> None:
    result = retex("recover", "--offsets", FILE, "--task", "cars", "-o", "back/", "--threads", "1")
    assert result.code == 0, result.err
    assert same_bits("back", "experts/cars")
    assert retex("recover", "--offsets", FILE, "--task", "cars", "-o", "other/", "--threads", "3").code == 0
    assert same_bits("other", "experts/cars")
    assert retex("recover", "--offsets", FILE, "--task", "dtd", "-o", "dtd/").code == 0
    assert not same_bits("dtd", "experts/dtd")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_in_the_type_the_expert_is_stored_in(made: Path, retex: Retex, dtype: torch.dtype) -> None:
    path = made / "experts/cars/model.safetensors"
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in load_file(path).items()}
    tensors["bert.encoder.layer.0.output.dense.bias"].view(-1)[0] = -0.0
    save_file(tensors, path, metadata={"format": "pt"})
    assert retex("fit-offsets", "--expert", "cars=experts/cars", "--lossless", "-o", FILE, "--quiet").code == 0
    assert retex("recover", "--offsets", FILE, "--task", "cars", "-o", "back/").code == 0
    assert same_bits("back", "experts/cars")


def test_a_grown_vocabulary_and_a_budget_of_ones_own(made: Path, retex: Retex) -> None:
    path = made / "experts/cars/model.safetensors"
    tensors = load_file(path)
    name = "bert.embeddings.word_embeddings.weight"
    tensors[name] = torch.cat([tensors[name], torch.randn(3, tensors[name].shape[1])])
    save_file(tensors, path, metadata={"format": "pt"})
    arguments = ("--lossless", "--budget", "3KB", "-o", FILE, "--json")
    result = retex("fit-offsets", *arguments)
    assert result.code == 0, result.err
    cars = result.json["tasks"]["cars"]
    assert 0 < cars["offset_bytes"] <= 3000
    assert cars["correction_bytes"] == sum(len(t) for n, t in load_file(FILE).items() if n.startswith("exact/cars/"))
    assert retex("recover", "--offsets", FILE, "--task", "cars", "-o", "back/").code == 0
    assert same_bits("back", "experts/cars")


def test_the_report_and_the_header_tell_of_the_correction(exact: Path, retex: Retex) -> None:
    with safe_open(FILE, "pt") as file:
        metadata = file.metadata()
    tasks = json.loads(metadata["tasks"])
    assert metadata["format_version"] == "2"
    assert "correction_bytes" not in tasks["dtd"]
    assert tasks["cars"]["correction_bytes"] > tasks["cars"]["offset_bytes"]
    assert json.loads(metadata["recipe"])["budget"] == "smallest total"
    result = retex("fit-offsets", "--lossless", "-o", "again.safetensors", "--expert", "cars=experts/cars")
    assert "offsets + correction / expert" in result.out
    assert "correction" in retex("inspect", FILE).out


@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_expert_gives_the_same_bytes(exact: Path, threads: int) -> None:
    retex_cli.fit_offsets("merged", {"cars": "experts/cars"}, "again.safetensors", lossless=True, threads=threads)
    ours, theirs = load_file(FILE), load_file("again.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if "/cars" in name)


def test_without_its_last_lossless_task_a_file_is_of_the_first_version(exact: Path, retex: Retex) -> None:
    assert retex("fit-offsets", "-o", FILE, "--remove", "cars").code == 0
    with safe_open(FILE, "pt") as file:
        assert file.metadata()["format_version"] == "1"
        assert not [name for name in file.keys() if name.startswith("exact/")]  # noqa: SIM118


def test_a_mix_and_a_foreign_head_leave_the_correction_out_and_say_so(exact: Path, retex: Retex) -> None:
    for arguments in (("--mix", "cars=0.7,dtd=0.3"), ("--task", "cars", "--head", "dtd")):
        result = retex("recover", "--offsets", FILE, *arguments, "-o", "mixed.safetensors", "--overwrite")
        assert result.code == 0, result.err
        assert "the exact correction of cars is not used" in result.err
    assert "correction" not in retex("recover", "--offsets", FILE, "--task", "dtd", "-o", "d.safetensors").err


def test_another_type_is_the_exact_expert_converted(exact: Path, retex: Retex) -> None:
    result = retex("recover", "--offsets", FILE, "--task", "cars", "--dtype", "bf16", "-o", "half.safetensors")
    assert result.code == 0, result.err
    expert, half = load_file("experts/cars/model.safetensors"), load_file("half.safetensors")
    assert all(torch.equal(half[name], expert[name].bfloat16()) for name in expert if expert[name].is_floating_point())


def damage(name: str, at: int) -> None:
    with safe_open(FILE, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(FILE)
    tensors[name].view(-1).view(torch.uint8)[at] ^= 1
    save_file(tensors, FILE, metadata=metadata)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "exact/cars/bert.pooler.dense.weight",
            "correction of tensor 'bert.pooler.dense.weight' of task 'cars' is damaged",
        ),
        (
            "tensors/cars/classifier.weight",
            "task 'cars' is damaged: tensor 'tensors/cars/classifier.weight' has another digest",
        ),
    ],
)
def test_damage_is_never_written(exact: Path, retex: Retex, name: str, words: str) -> None:
    damage(name, 50)
    result = retex("recover", "--offsets", FILE, "--task", "cars", "-o", "back/")
    assert result.code == 1
    assert words in result.err
    assert not (exact / "back").exists()
    assert retex("recover", "--offsets", FILE, "--task", "dtd", "-o", "dtd/").code == 0


def test_a_correction_that_is_missing_is_damage(exact: Path, retex: Retex) -> None:
    with safe_open(FILE, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(FILE)
    del tensors["exact/cars/bert.pooler.dense.weight"]
    save_file(tensors, FILE, metadata=metadata)
    result = retex("recover", "--offsets", FILE, "--task", "cars", "-o", "back/")
    assert result.code == 1
    assert "correction of tensor 'bert.pooler.dense.weight' of task 'cars' is damaged: it is not there" in result.err


def test_a_machine_that_predicts_otherwise_says_so(exact: Path, retex: Retex, monkeypatch: pytest.MonkeyPatch) -> None:
    rounded = fixed.Prediction._rounded
    monkeypatch.setattr(fixed.Prediction, "_rounded", lambda self, value: rounded(self, value * (1 + 1e-5)))
    result = retex("recover", "--offsets", FILE, "--task", "cars", "-o", "back/")
    assert result.code == 1
    assert "does not come back bit for bit" in result.err
    assert "predicts other values" in result.err
    assert not (exact / "back").exists()


def test_what_eval_scores_is_the_expert_itself(exact: Path, retex: Retex) -> None:
    result = retex("eval", "--offsets", FILE, "--protocols", "K", "--json")
    assert result.code == 0, result.err
    cars = result.json["tasks"]["cars"]
    assert cars["agreement"]["K"] == 1
    assert cars["recovered"]["K"] == cars["expert"]


def test_without_base_and_experts(exact: Path, retex: Retex) -> None:
    kept = exact / "kept"
    shutil.move(exact / "experts/cars", kept)
    for folder in ("base", "experts"):
        shutil.rmtree(exact / folder)
    assert retex("recover", "--offsets", FILE, "--task", "cars", "-o", "back/").code == 0
    assert same_bits("back", kept)
    file = OffsetsFile(FILE, open_checkpoint("merged"))
    assert file.is_exact({"cars": 1.0}, "cars")
    assert not file.is_exact({"dtd": 1.0}, "dtd")


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_a_switched_model_has_the_very_bits(exact: Path, device: str) -> None:
    model = AutoModelForSequenceClassification.from_pretrained("experts/cars").to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    predictor = retex_cli.Predictor.load("merged", FILE, device=device)
    expert = load_file("experts/cars/model.safetensors")
    for _ in range(2):
        predictor.apply_(model, "cars")
        own = model.state_dict()
        assert all(torch.equal(own[name].cpu(), value) for name, value in expert.items())
        predictor.apply_(model, {"cars": 0.5, "dtd": 0.5}, head="cars")
        assert not torch.equal(model.state_dict()["bert.pooler.dense.weight"].cpu(), expert["bert.pooler.dense.weight"])
    predictor.apply_(model, "cars", head=False)
    assert torch.equal(model.state_dict()["bert.pooler.dense.weight"].cpu(), expert["bert.pooler.dense.weight"])
