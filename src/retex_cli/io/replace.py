"""Temporary names beside a target, flushing, and the one rename that makes an output visible."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def write_all(fd: int, view: memoryview, position: int) -> None:
    """Write every byte at a position of the file; a partial write goes on where it stopped."""
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], position + done)


def create(path: Path) -> int:
    """A descriptor of a new file whose mode is what the umask says."""
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)


def write_new(path: Path, data: bytes | memoryview) -> None:
    """A new file with these bytes, flushed to the disk."""
    fd = create(path)
    try:
        write_all(fd, memoryview(data), 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """Remove a file or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_beside(target: Path) -> Iterator[Path]:
    """A free name ``.target.tmp-<pid>`` in the target's folder; nothing of that name is left afterwards.

    What processes that are dead left under such names is removed too. The target's folder is made if it is not there,
    and removed again if nothing was put into it.
    """
    made = _make_folders(target.parent)
    _sweep(target, "tmp")
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    remove(temporary)
    try:
        yield temporary
    finally:
        remove(temporary)
        for folder in made:
            with contextlib.suppress(OSError):  # not empty: the output is in it
                folder.rmdir()


def _sweep(target: Path, kind: str) -> None:
    """Remove what processes that are dead left beside the target."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.{kind}-*"):
        pid = left.name.rpartition("-")[2]
        if pid.isdigit() and not _alive(int(pid)):
            remove(left)


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder and those above it; those that were made, innermost first."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return made


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sync_folder(folder: Path) -> None:
    """Make new names in a folder durable; some filesystems cannot, which is no failure of ours."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def put_in_place(new: Path, target: Path) -> None:
    """Rename ``new`` to ``target``: one atomic step, or two renames where a folder is there already.

    When the second rename fails the old folder comes back.
    """
    if not target.is_dir():
        new.replace(target)
    else:
        old = target.with_name(f".{target.name}.old-{os.getpid()}")
        remove(old)
        target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            old.rename(target)
            raise
        remove(old)
        _sweep(target, "old")
    sync_folder(target.parent)
