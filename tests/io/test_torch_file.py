from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from retex_cli.errors import RetexError
from retex_cli.io.torch_file import TorchFile


def saved(tmp_path: Path, value: object, **options: bool) -> Path:
    path = tmp_path / "pytorch_model.bin"
    torch.save(value, path, **options)
    return path


def test_tensors_read_back_with_type_and_shape(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(3, 4), "h": torch.randn(5).half(), "n": torch.tensor(7), "e": torch.empty(0, 2)}
    file = TorchFile(saved(tmp_path, tensors))
    assert list(file.tensors) == list(tensors)
    for name, expected in tensors.items():
        found = file.read(name)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("zipped", [True, False])
def test_both_file_formats_open(tmp_path: Path, zipped: bool) -> None:
    path = saved(tmp_path, {"w": torch.arange(6.0)}, _use_new_zipfile_serialization=zipped)
    out = torch.empty(3, dtype=torch.bfloat16)
    TorchFile(path).read_into("w", 2, out)
    assert out.tolist() == [2.0, 3.0, 4.0]


def test_tied_storages_become_one_tensor_and_an_alias(tmp_path: Path) -> None:
    embedding = torch.randn(4, 3)
    state = {"wte.weight": embedding, "copy": embedding.clone(), "lm_head.weight": embedding}
    file = TorchFile(saved(tmp_path, state))
    assert list(file.tensors) == ["wte.weight", "copy"]
    assert file.aliases == {"lm_head.weight": "wte.weight"}


def test_views_of_one_storage_with_different_shapes_stay_apart(tmp_path: Path) -> None:
    fused = torch.arange(12.0).view(4, 3)
    file = TorchFile(saved(tmp_path, {"fused": fused, "top": fused[:2], "turned": fused.T}))
    assert file.aliases == {}
    assert torch.equal(file.read("top"), fused[:2])
    out = torch.empty(5)
    file.read_into("turned", 3, out)  # row-major order of the transposed tensor
    assert torch.equal(out, fused.T.flatten()[3:8])
    assert file.read("turned").is_contiguous()


def test_reading_does_not_hand_out_the_file_s_memory(tmp_path: Path) -> None:
    file = TorchFile(saved(tmp_path, {"w": torch.ones(3)}))
    file.read("w").zero_()
    assert torch.equal(file.read("w"), torch.ones(3))


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_the_usual_wrappers_are_opened(tmp_path: Path, key: str) -> None:
    path = saved(tmp_path, {key: {"w": torch.ones(2)}, "epoch": 3})
    assert list(TorchFile(path).tensors) == ["w"]


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("run by a pickle",)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path, {"w": torch.ones(2), "x": Evil()})
    with pytest.raises(RetexError, match="the weights-only loader refuses it") as caught:
        TorchFile(path)
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message
    assert "run by a pickle" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps({"w": 1})[:-3], b"PK\x03\x04" + bytes(100)])
def test_damage_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(content)
    with pytest.raises(RetexError) as caught:
        TorchFile(path)
    assert caught.value.message.startswith(f"{path}: ")
    assert "\n" not in caught.value.message


def test_a_truncated_file_names_itself(tmp_path: Path) -> None:
    path = saved(tmp_path, {"w": torch.ones(10_000)})
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(RetexError, match=r"pytorch_model\.bin: a damaged or truncated torch file"):
        TorchFile(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([torch.ones(1)], "holds a list, not a state dict"),
        ({}, "holds a dict, not a state dict"),
        ({"w": torch.ones(1), "step": 3}, "entry 'step' is a int, not a tensor"),
        ({"w": torch.ones(2, 2).to_sparse()}, "tensor 'w' is not a plain dense tensor"),
    ],
)
def test_what_is_not_a_state_dict_is_refused(tmp_path: Path, value: object, message: str) -> None:
    with pytest.raises(RetexError, match=message):
        TorchFile(saved(tmp_path, value))
