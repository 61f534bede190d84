from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from retex_cli.errors import RetexError, UsageError
from retex_cli.io.artefact import check_artefact, open_artefact, write_artefact

CODE = {"codes/cars": torch.arange(5, dtype=torch.uint8), "tensors/cars/head": torch.ones(2, 3)}


def test_an_artefact_is_ordinary_safetensors_that_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "offsets.safetensors"
    size = write_artefact(path, CODE, {"recipe": "{}"}, format="retex.offsets", version=1)
    assert size == path.stat().st_size
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "retex.offsets", "format_version": "1", "recipe": "{}"}
        assert torch.equal(file.get_tensor("tensors/cars/head"), CODE["tensors/cars/head"])
    with open_artefact(path, format="retex.offsets", versions={1, 2}) as opened:
        assert torch.equal(opened.read("codes/cars"), CODE["codes/cars"])


def test_another_format_version_or_thing_is_refused_by_name(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    path = tmp_path / "offsets.safetensors"
    write_artefact(path, CODE, {}, format="retex.offsets", version=7)
    with pytest.raises(RetexError, match=r"offsets\.safetensors: retex\.offsets version 7, this retex reads 1, 2"):
        open_artefact(path, format="retex.offsets", versions={2, 1})
    with pytest.raises(RetexError, match=r"a retex\.offsets file, not a retex\.signatures file"):
        open_artefact(path, format="retex.signatures", versions={1})
    model = make_model("m", {"w": torch.ones(1)})
    with pytest.raises(RetexError, match=r"model\.safetensors: a checkpoint, not a retex\.offsets file"):
        open_artefact(model / "model.safetensors", format="retex.offsets", versions={1})
    with pytest.raises(RetexError, match=r"m: a folder, not a retex\.offsets file"):
        open_artefact(model, format="retex.offsets", versions={1})
    with pytest.raises(RetexError, match=r"no/such\.safetensors: no such file"):
        open_artefact("no/such.safetensors", format="retex.offsets", versions={1})


def test_an_artefact_is_one_file_and_does_not_overwrite_by_itself(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one safetensors file"):
        check_artefact(tmp_path / "folder", overwrite=False)
    path = tmp_path / "a.safetensors"
    write_artefact(path, CODE, {}, format="x", version=1)
    with pytest.raises(RetexError, match="already exists"):
        write_artefact(path, {}, {}, format="x", version=1)
    write_artefact(path, {}, {}, format="x", version=2, overwrite=True)
    with open_artefact(path, format="x", versions={2}) as opened:
        assert not opened.tensors


def test_the_same_content_is_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write_artefact(tmp_path / f"{name}.safetensors", CODE, {"k": "v"}, format="x", version=1)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
