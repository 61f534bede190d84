"""SHA-256 of files and of the tensors in them, remembered from run to run as git remembers what it has hashed: by what
the system says of a file.

A file that is written to changes its change time, which no program can set back, so an equal device, inode, size,
modification and change time mean equal bytes. Digests lie in ``$XDG_CACHE_HOME/retex/digests``, one small file each;
deleting them costs nothing but the time to hash again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from retex_cli.errors import RetexError

SMALL = 1 << 24
"""Bytes below which a file is hashed sooner than looked up."""
YOUNG = 2_000_000_000
"""Nanoseconds: a file changed this lately may change again within one tick of a coarse clock."""


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes; other threads run meanwhile. RetexError if it cannot be read."""
    try:
        with path.open("rb", buffering=0) as file:
            before = os.fstat(file.fileno())
            known = recall(before, "", 1)
            if known is not None:
                return known[0]
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            after = os.fstat(file.fileno())
    except OSError as error:
        raise RetexError(f"{path}: cannot be read: {error.strerror}") from None
    if key(before) == key(after):
        remember(after, "", [digest])
    return digest


def sha256_path(path: Path) -> str:
    """The same of a file, or of all files below a folder and their names."""
    if not path.is_dir():
        return sha256_file(path)
    digest = hashlib.sha256()
    for file in sorted(each for each in path.rglob("*") if each.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retex" / "digests"


def key(stat: os.stat_result) -> str:
    """What changes when the bytes of a file do."""
    return f"{stat.st_dev}-{stat.st_ino}-{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ctime_ns}"


def recall(stat: os.stat_result, what: str, count: int) -> list[str] | None:
    """The digests that were kept of just this file under the word ``what``; None where there are none, or not as many
    sensible ones."""
    if stat.st_size < SMALL:
        return None
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        found = (_folder() / (key(stat) + what)).read_text().split("\n")
        return found if len(found) == count and all(re.fullmatch("[0-9a-f]{64}", each) for each in found) else None
    return None


def remember(stat: os.stat_result, what: str, digests: Sequence[str]) -> None:
    """Keep digests for next time; a place that cannot be written to is nobody's concern."""
    if stat.st_size < SMALL or time.time_ns() - stat.st_ctime_ns < YOUNG:
        return
    with contextlib.suppress(OSError, RuntimeError):
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
            file.write("\n".join(digests))
        Path(file.name).replace(folder / (key(stat) + what))
