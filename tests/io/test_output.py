from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from retex_cli.errors import RetexError, UsageError
from retex_cli.io.output import Output, write_error


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("-", "stdout"),
        ("a.safetensors", "file"),
        ("deep/er/a.safetensors", "file"),
        ("merged", "folder"),
        ("merged/", "folder"),
        ("merged.v2", "folder"),
        ("a.safetensors/", "folder"),
    ],
)
def test_what_o_means(text: str, kind: str) -> None:
    output = Output.parse(text)
    assert output.kind == kind
    assert (output.path is None) == (kind == "stdout")


@pytest.mark.parametrize("text", ["", "model.bin", "x.pt", "x.gguf"])
def test_other_formats_are_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="outputs are safetensors"):
        Output.parse(text)


def test_an_existing_folder_of_any_name_stays_a_folder(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").mkdir()
    assert Output.parse(tmp_path / "m.safetensors").kind == "folder"


def checkpoint(folder: Path) -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"old")
    (folder / "config.json").write_text("{}")
    return folder


def test_what_exists_is_refused_without_overwrite(tmp_path: Path) -> None:
    folder, file = checkpoint(tmp_path / "m"), tmp_path / "a.safetensors"
    file.write_bytes(b"old")
    for path in (folder, file):
        with pytest.raises(RetexError, match="already exists") as caught:
            Output.parse(path).check(overwrite=False)
        assert caught.value.hint is not None
        assert "--overwrite" in caught.value.hint
        Output.parse(path).check(overwrite=True)
    (tmp_path / "empty").mkdir()
    Output.parse(tmp_path / "empty").check(overwrite=False)  # there is nothing to lose


def test_a_file_is_no_folder_and_a_folder_no_file(tmp_path: Path) -> None:
    (tmp_path / "thing").write_text("")
    with pytest.raises(RetexError, match="exists and is not a folder"):
        Output.parse(tmp_path / "thing").check(overwrite=True)
    with pytest.raises(RetexError, match="thing is a file"):
        Output.parse(tmp_path / "thing" / "a.safetensors").check(overwrite=True)
    os.mkfifo(tmp_path / "p.safetensors")
    with pytest.raises(RetexError, match="not a regular file"):
        Output.parse(tmp_path / "p.safetensors").check(overwrite=True)


def test_overwrite_does_not_remove_what_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(RetexError, match=r"not a checkpoint \(it holds 'thesis\.tex'\)"):
        Output.parse(home).check(overwrite=True)
    workspace = checkpoint(tmp_path / "w")
    (workspace / "retex.toml").write_text("")
    with pytest.raises(RetexError, match="not a checkpoint"):
        Output.parse(workspace).check(overwrite=True)
    inside = checkpoint(tmp_path / "inside")
    monkeypatch.chdir(inside)
    with pytest.raises(RetexError, match="the folder you are in"):
        Output.parse(".").check(overwrite=True)


def test_an_output_that_is_an_input_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "expert")
    weights = folder / "model.safetensors"
    (tmp_path / "link.safetensors").symlink_to(weights)
    os.link(weights, tmp_path / "hard.safetensors")
    for path in (weights, folder, tmp_path / "link.safetensors", tmp_path / "hard.safetensors", tmp_path):
        with pytest.raises(RetexError, match=r"the output is also an input \(.*model\.safetensors\)"):
            Output.parse(path).check(overwrite=True, inputs=[weights])
    Output.parse(tmp_path / "other.safetensors").check(overwrite=True, inputs=[weights])
    Output.parse(folder / "merged").check(overwrite=True, inputs=[weights])


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_too_little_space_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, 5_000_000))
    Output.parse(tmp_path / "a.safetensors").check(overwrite=False, nbytes=3_000_000)
    with pytest.raises(RetexError, match="not enough disk space: 4,500,000 bytes to write, 5,000,000 free"):
        Output.parse(tmp_path / "new" / "a.safetensors").check(overwrite=False, nbytes=4_500_000)
    assert not (tmp_path / "new").exists()


def test_a_folder_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(RetexError, match=f"no permission in {tmp_path}"):
        Output.parse(tmp_path / "a.safetensors").check(overwrite=False)


def test_standard_output_has_nothing_to_check() -> None:
    Output.parse("-").check(overwrite=False, nbytes=10**18)
    assert str(Output.parse("-")) == "standard output"


def test_other_write_failures_are_said_in_one_line() -> None:
    assert "Read-only file system" in write_error("out", OSError(30, "Read-only file system"), 0, 9).message
    assert "closed the pipe after 5 of 9 bytes" in write_error("out", OSError(32, "Broken pipe"), 5, 9).message
