from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from retex_cli.errors import RetexError
from retex_cli.io.checkpoint import open_checkpoint, open_expert

MakeModel = Callable[..., Path]

W = {"a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.ones(2)}


def sharded(folder: Path, shards: dict[str, dict[str, torch.Tensor]], index: dict[str, str] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file, tensors in shards.items():
        if file.endswith(".bin"):
            torch.save(tensors, folder / file)
        else:
            save_file(tensors, folder / file)
    mapping = index or {name: file for file, tensors in shards.items() for name in tensors}
    stem = "pytorch_model.bin" if any(file.endswith(".bin") for file in shards) else "model.safetensors"
    (folder / f"{stem}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapping}))
    return folder


def test_a_file_a_folder_and_shards_read_the_same(tmp_path: Path, make_model: MakeModel) -> None:
    folder = make_model("one", W, {"model_type": "bert"})
    split = sharded(
        tmp_path / "two",
        {
            "model-00001-of-00002.safetensors": {"a.weight": W["a.weight"]},
            "model-00002-of-00002.safetensors": {"b.bias": W["b.bias"]},
        },
    )
    for reference in (folder, folder / "model.safetensors", str(split)):
        with open_checkpoint(reference) as checkpoint:
            assert checkpoint.reference == str(reference)
            assert checkpoint.revision is None
            assert set(checkpoint.tensors) == set(W)
            assert checkpoint.nbytes == 8 * 4
            for name, expected in W.items():
                assert torch.equal(checkpoint.read(name), expected)
                out = torch.empty(1)
                checkpoint.read_into(name, 1, out)
                assert out.item() == expected.flatten()[1]


def test_a_folder_has_config_and_side_files_and_a_bare_file_has_none(make_model: MakeModel) -> None:
    folder = make_model("m", W, {"vocab_size": 7})
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config == {"vocab_size": 7}
        assert checkpoint.folder == folder
        assert checkpoint.files == (folder / "model.safetensors",)
        assert checkpoint.metadata == {"format": "pt"}
        assert checkpoint.tensors["b.bias"].file == folder / "model.safetensors"
    with open_checkpoint(folder / "model.safetensors") as checkpoint:
        assert checkpoint.config is None
        assert checkpoint.folder is None
        assert checkpoint.side_files() == {}


def test_side_files_travel_and_training_leftovers_stay(make_model: MakeModel) -> None:
    folder = make_model("m", W, {})
    (folder / "1_Pooling").mkdir()
    (folder / "checkpoint-5").mkdir()
    travel = [
        "tokenizer.json",
        "vocab.txt",
        "preprocessor_config.json",
        "generation_config.json",
        "chat_template.jinja",
    ]
    travel += ["spiece.model", "1_Pooling/config.json", "modeling_own.py"]
    stay = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin", "README.md"]
    stay += ["pytorch_model.bin", "tf_model.h5", "checkpoint-5/config.json", "adapter_config.json", "data_config.json"]
    for name in travel + stay:
        (folder / name).write_text("{}")
    with open_checkpoint(folder) as checkpoint:
        found = checkpoint.side_files()
    assert sorted(found) == sorted([*travel, "config.json"])
    assert found["vocab.txt"] == folder / "vocab.txt"


def test_tied_weights_of_a_bin_read_under_both_names(make_model: MakeModel) -> None:
    weight = torch.randn(3, 2)
    folder = make_model("m", {"wte.weight": weight, "lm_head.weight": weight}, file="pytorch_model.bin")
    with open_checkpoint(folder) as checkpoint:
        assert list(checkpoint.tensors) == ["wte.weight"]
        assert checkpoint.aliases == {"lm_head.weight": "wte.weight"}
        assert torch.equal(checkpoint.read("lm_head.weight"), weight)
        out = torch.empty(2)
        checkpoint.read_into("lm_head.weight", 4, out)
        assert torch.equal(out, weight[2])


def test_shards_of_pickles_open_by_their_index(tmp_path: Path) -> None:
    parts = {f"pytorch_model-0000{k}-of-00002.bin": {f"w{k}": torch.full((2,), float(k))} for k in (1, 2)}
    with open_checkpoint(sharded(tmp_path / "m", parts)) as checkpoint:
        assert [path.name for path in checkpoint.files] == list(parts)
        assert checkpoint.read("w2").tolist() == [2.0, 2.0]


def test_the_plain_file_wins_over_an_index_as_in_transformers(tmp_path: Path, make_model: MakeModel) -> None:
    sharded(tmp_path / "m", {"model-00001-of-00001.safetensors": {"old": torch.ones(1)}})
    with open_checkpoint(make_model("m", {"new": torch.ones(1)})) as checkpoint:
        assert list(checkpoint.tensors) == ["new"]


def test_one_other_safetensors_file_is_taken_and_two_are_not(tmp_path: Path, make_model: MakeModel) -> None:
    folder = make_model("m", W, file="merged.safetensors")
    open_checkpoint(folder).close()
    make_model("m", W, file="other.safetensors")
    with pytest.raises(RetexError, match=r"several weight files.*: merged\.safetensors, other\.safetensors"):
        open_checkpoint(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RetexError, match="empty: no weights in this folder"):
        open_checkpoint(tmp_path / "empty")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = sharded(
        tmp_path / "m", {"a.safetensors": {"a": torch.ones(1)}}, {"a": "a.safetensors", "b": "b.safetensors"}
    )
    with pytest.raises(RetexError, match=r"m/b\.safetensors: missing shard: model\.safetensors\.index\.json expects 1"):
        open_checkpoint(folder)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    folder = sharded(
        tmp_path / "m", {"a.safetensors": {"a": torch.ones(1)}}, {"a": "a.safetensors", "b": "a.safetensors"}
    )
    with pytest.raises(RetexError, match=r"tensor 'b' should be in a\.safetensors, which does not have it"):
        open_checkpoint(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    both = {"a.safetensors": {"a": torch.ones(1)}, "b.safetensors": {"a": torch.zeros(1), "b": torch.ones(1)}}
    folder = sharded(tmp_path / "m", both, {"a": "a.safetensors", "b": "b.safetensors"})
    with pytest.raises(RetexError, match=r"tensor 'a' is in two files, a\.safetensors and b\.safetensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize("file", ["../m.safetensors", "/etc/m.safetensors", 3])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, file: object) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(RetexError, match="damaged index: tensor 'a' is said to be in"):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {}}', '{"weight_map": []}'])
def test_a_damaged_index_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(RetexError, match=r"model\.safetensors\.index\.json: "):
        open_checkpoint(tmp_path)


def test_a_damaged_config_is_named(make_model: MakeModel) -> None:
    folder = make_model("m", W)
    (folder / "config.json").write_text('{"a": ')
    with pytest.raises(RetexError, match=r"config\.json: not valid JSON: .*line 1 column 7"):
        open_checkpoint(folder)


def test_a_damaged_second_shard_gives_the_first_back(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {f"{k}.safetensors": {k: torch.ones(4)} for k in "ab"})
    os.truncate(folder / "b.safetensors", 20)
    before = len(os.listdir("/dev/fd"))  # noqa: PTH208
    with pytest.raises(RetexError, match=r"b\.safetensors: truncated"):
        open_checkpoint(folder)
    assert len(os.listdir("/dev/fd")) == before  # noqa: PTH208


def test_an_adapter_is_not_a_model(make_model: MakeModel) -> None:
    folder = make_model("m", W, file="adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(RetexError, match=r"a LoRA adapter \(adapter_model\.safetensors\) is not a model by itself"):
        open_checkpoint(folder)
    make_model("m", W)
    with pytest.raises(RetexError, match="holds both a model"):
        open_checkpoint(folder)


@pytest.mark.parametrize("reference", ["./nowhere", "nowhere", "a/b/c", "/no/where", "models/x.safetensors", "x@y", ""])
def test_what_is_neither_a_path_nor_an_id_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if reference:
        with pytest.raises(RetexError, match="no such file or folder"):
            open_checkpoint(reference)
    else:
        with pytest.raises(RetexError):
            open_checkpoint(reference)


def test_an_ordinary_expert_opens_like_any_checkpoint(make_model: MakeModel) -> None:
    base = open_checkpoint(make_model("base", W))
    expert = open_expert(make_model("expert", W), base)
    assert list(expert.tensors) == list(base.tensors)
    assert expert.low_rank("a.weight") is None
    base.close()
    base.close()  # twice is fine
