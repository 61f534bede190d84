"""``retex fit-offsets``: what the file holds, that it is deterministic, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from tests.conftest import Retex


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def test_any_safetensors_reader_sees_what_is_inside(made: Path) -> None:
    tensors = load_file(made / "offsets.safetensors")
    tasks = json.loads(header(made / "offsets.safetensors")["tasks"])
    assert sorted(tasks) == ["cars", "dtd"]
    for task, record in tasks.items():
        assert len(tensors[f"offsets/{task}"]) == record["offset_bytes"] <= record["budget_bytes"]
        expert = load_file(made / "experts" / task / "model.safetensors")
        for name in ("classifier.weight", "classifier.bias"):
            assert torch.equal(tensors[f"tensors/{task}/{name}"], expert[name])
        assert "config.json" in record["files"]


def test_side_files_are_stored_once_and_not_at_all_where_merged_has_them(made: Path) -> None:
    tasks = json.loads(header(made / "offsets.safetensors")["tasks"])
    names = load_file(made / "offsets.safetensors")
    stored = {name.removeprefix("files/") for name in names if name.startswith("files/")}
    wanted = {digest for record in tasks.values() for digest in record["files"].values()}
    merged = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (made / "merged").iterdir()}
    shared = tasks["cars"]["files"].items() & tasks["dtd"]["files"].items()
    assert {name for name, _ in shared} >= {"tokenizer.json", "tokenizer_config.json"}
    assert wanted & merged
    assert stored == wanted - merged
    assert tasks["cars"]["files"]["config.json"] in stored


def test_the_recipe_names_every_input_by_its_hash(made: Path) -> None:
    recipe = json.loads(header(made / "offsets.safetensors")["recipe"])
    assert recipe["budget"] == "5%"
    assert len(recipe["merged"]["files"]["model.safetensors"]) == 64
    assert set(recipe["experts"]) == {"cars", "dtd"}


@pytest.mark.parametrize("threads", ["1", "3"])
def test_the_same_inputs_give_the_same_bytes(made: Path, retex: Retex, threads: str) -> None:
    before = (made / "offsets.safetensors").read_bytes()
    result = retex("fit-offsets", "--overwrite", "--threads", threads)
    assert result.code == 0, result.err
    assert (made / "offsets.safetensors").read_bytes() == before


def test_a_task_may_be_called_as_pieces_of_a_fit_are(made: Path, retex: Retex) -> None:
    given = [f"--expert={name}=experts/{task}" for name, task in (("coded", "cars"), ("middle", "dtd"))]
    result = retex("fit-offsets", "--merged", "merged", *given, "-o", "named.safetensors", "--json")
    assert result.code == 0, result.err
    assert {"coded", "middle"} <= set(result.json["tasks"])


def test_json_counts_every_byte(made: Path, retex: Retex) -> None:
    result = retex("fit-offsets", "--json", "--budget", "3KB", "-o", "small.safetensors")
    assert result.code == 0, result.err
    assert result.json["bytes"] == (made / "small.safetensors").stat().st_size
    cars = result.json["tasks"]["cars"]
    assert cars["offset_bytes"] <= 3000
    assert cars["task_tensor_bytes"] == 4 * (2 * 32 + 2)


def test_a_budget_below_the_least_names_the_least_and_writes_nothing(made: Path, retex: Retex) -> None:
    result = retex("fit-offsets", "--budget", "20", "-o", "none.safetensors")
    assert result.code == 1
    assert "20 bytes for task 'cars'; the least that holds anything is" in result.err
    assert "--budget" in result.err
    assert not (made / "none.safetensors").exists()


def test_an_expert_of_another_shape_is_refused(made: Path, retex: Retex) -> None:
    tensors = load_file(made / "experts/cars/model.safetensors")
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    tensors[name] = tensors[name][:, :-1].clone()
    save_file(tensors, made / "experts/cars/model.safetensors")
    result = retex("fit-offsets", "--overwrite")
    assert result.code == 1
    assert "encoder.layer.0.intermediate.dense.weight" in result.err
    assert "[64, 32]" in result.err
    assert "[64, 31]" in result.err


def test_nan_in_an_expert_is_refused_with_its_place(made: Path, retex: Retex) -> None:
    tensors = load_file(made / "experts/dtd/model.safetensors")
    tensors["bert.encoder.layer.1.output.dense.bias"][3] = float("nan")
    save_file(tensors, made / "experts/dtd/model.safetensors")
    before = (made / "offsets.safetensors").read_bytes()
    result = retex("fit-offsets", "--overwrite")
    assert result.code == 1
    assert "bert.encoder.layer.1.output.dense.bias" in result.err
    assert "NaN" in result.err
    assert (made / "offsets.safetensors").read_bytes() == before


def test_no_expert_at_all_is_wrong_usage(tmp_path: Path, retex: Retex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = retex("fit-offsets", "--merged", "m.safetensors")
    assert result.code == 2
    assert "--expert" in result.err


def test_a_grown_vocabulary_comes_back_whole(made: Path, retex: Retex) -> None:
    """Rows that the expert added are task tensors; the rows in common are merged and get offsets."""
    folder = made / "experts/cars"
    tensors = load_file(folder / "model.safetensors")
    name = "bert.embeddings.word_embeddings.weight"
    extra = torch.randn(3, tensors[name].shape[1], generator=torch.Generator().manual_seed(0))
    tensors[name] = torch.cat([tensors[name], extra])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] += 3
    (folder / "config.json").write_text(json.dumps(config))
    shutil.rmtree(made / "merged")
    for command in ("merge", "fit-offsets"):
        result = retex(command, "--overwrite", "--quiet")
        assert result.code == 0, result.err
    assert retex("recover", "--task", "cars", "-o", "cars/", "--quiet").code == 0
    back = load_file(made / "cars/model.safetensors")[name]
    assert back.shape == tensors[name].shape
    assert torch.equal(back[-3:], extra)
    assert load_file(made / "merged/model.safetensors")["embeddings.word_embeddings.weight"].shape[0] == len(back) - 3
