"""SHA-256 of files: right, remembered, and never remembered of another file or of what was there before."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from retex_cli.errors import RetexError
from retex_cli.io import digests
from retex_cli.io.digests import sha256_file


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own that remembers small and young files too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "SMALL", 0)
    monkeypatch.setattr(digests, "YOUNG", 0)
    return tmp_path / "cache/retex/digests"


def _unread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the file was hashed again")

    monkeypatch.setattr(hashlib, "file_digest", refuse)


def test_it_is_sha256(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc" * 1_000_000)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(b"abc" * 1_000_000).hexdigest()
    with pytest.raises(RetexError, match="nothing: cannot be read"):
        sha256_file(tmp_path / "nothing")


def test_a_file_that_did_not_change_is_not_read_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    first = sha256_file(tmp_path / "x")
    _unread(monkeypatch)
    assert sha256_file(tmp_path / "x") == first
    (tmp_path / "link").symlink_to(tmp_path / "x")
    assert sha256_file(tmp_path / "link") == first, "the same file under another name"


def test_what_was_written_to_is_hashed_again_even_with_its_old_size_and_time(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    before = path.stat()
    sha256_file(path)
    path.write_bytes(b"abd")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert sha256_file(path) == hashlib.sha256(b"abd").hexdigest()


@pytest.mark.parametrize("content", ["", "zz", "0" * 63, "G" * 64])
def test_damaged_memory_is_no_memory(tmp_path: Path, cache: Path, content: str) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    sha256_file(tmp_path / "x")
    (entry,) = cache.iterdir()
    entry.write_text(content)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()


def test_a_cache_that_cannot_be_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_file(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()


def test_small_and_young_files_are_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "small").write_bytes(b"abc")
    (tmp_path / "young").write_bytes(bytes(digests.SMALL))
    for name in ("small", "young"):
        sha256_file(tmp_path / name)
    assert not (tmp_path / "cache").exists()
