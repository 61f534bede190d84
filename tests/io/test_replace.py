from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from retex_cli.io.replace import put_in_place, temporary_beside


@pytest.fixture
def dead() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def test_only_what_the_dead_left_is_swept(tmp_path: Path, dead: int) -> None:
    target = tmp_path / "a[1]"
    kept = [f".a[1].tmp-{os.getppid()}", ".a[1].tmp-notes", f".b.tmp-{dead}", f".a1.tmp-{dead}"]
    for name in [f".a[1].tmp-{dead}", *kept]:
        (tmp_path / name).mkdir()
    with temporary_beside(target) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("x")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_folders_that_were_made_for_nothing_go_again(tmp_path: Path) -> None:
    with temporary_beside(tmp_path / "x/y/z"):
        assert (tmp_path / "x/y").is_dir()
    assert list(tmp_path.iterdir()) == []
    with temporary_beside(tmp_path / "x/y/z") as temporary:
        temporary.write_text("kept")
        put_in_place(temporary, tmp_path / "x/y/z")
    assert (tmp_path / "x/y/z").read_text() == "kept"


def test_a_folder_is_replaced_whole_and_old_copies_go(tmp_path: Path, dead: int) -> None:
    old, new, rest = tmp_path / "m", tmp_path / "new", tmp_path / f".m.old-{dead}"
    for folder, file in ((old, "stale"), (new, "fresh"), (rest, "older")):
        folder.mkdir()
        (folder / file).write_text("")
    put_in_place(new, old)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert [path.name for path in old.iterdir()] == ["fresh"]
