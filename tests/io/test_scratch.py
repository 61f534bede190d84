"""Pieces of a long job: as they were put, or not at all; found under their own key alone; gone when it is done."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from retex_cli.io.scratch import Scratch

TENSORS = {
    "bytes": torch.arange(5, dtype=torch.uint8),
    "wide": torch.randn(3, 4, dtype=torch.float64),
    "turned": torch.randn(4, 3).T,
    "none": torch.empty(0, 7),
    "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
}


@pytest.fixture
def scratch(tmp_path: Path) -> Scratch:
    return Scratch(tmp_path / "out.safetensors", "a" * 64)


def piece_file(tmp_path: Path) -> Path:
    [found] = [path for path in tmp_path.rglob("*") if path.is_file()]
    return found


def test_a_piece_comes_back_and_outlives_its_file(scratch: Scratch, tmp_path: Path) -> None:
    assert scratch.get("cars/a.b/0") is None
    scratch.put("cars/a.b/0", TENSORS, {"digest": "00ff"})
    found = scratch.get("cars/a.b/0")
    assert found is not None
    later = scratch.stored("cars/a.b/0", "turned")
    assert (later.dtype, later.shape) == (torch.float32, (3, 4))
    assert torch.equal(later.read(), TENSORS["turned"])
    scratch.drop("cars/")
    assert scratch.get("cars/a.b/0") is None
    tensors, texts = found
    assert texts["digest"] == "00ff"
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    tensors["wide"].zero_()  # its own copy: nothing else sees it


def test_writing_to_a_mapped_tensor_leaves_the_piece_alone(scratch: Scratch) -> None:
    scratch.put("x", TENSORS)
    first = scratch.get("x")
    assert first is not None
    first[0]["wide"].zero_()
    again = scratch.get("x")
    assert again is not None
    assert torch.equal(again[0]["wide"], TENSORS["wide"])


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_piece_is_none(scratch: Scratch, tmp_path: Path, damage: str) -> None:
    scratch.put("x", TENSORS)
    path = piece_file(tmp_path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 16
    path.write_bytes({"flip": bytes(data), "cut": bytes(data[:-5]), "empty": b""}[damage])
    assert scratch.get("x") is None


def test_another_key_finds_nothing_and_all_keys_are_cleared(scratch: Scratch, tmp_path: Path) -> None:
    scratch.put("x", TENSORS)
    other, same = Scratch(tmp_path / "out.safetensors", "b" * 64), Scratch(tmp_path / "out.safetensors", "a" * 64)
    assert other.get("x") is None
    assert same.get("x") is not None
    neighbour = Scratch(tmp_path / "other.safetensors", "a" * 64)
    neighbour.put("x", TENSORS)
    other.put("y", TENSORS)
    other.remove()
    assert same.get("x") is None
    assert neighbour.get("x") is not None
