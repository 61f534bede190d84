"""Where a writer's bytes go: positioned writes to files, or one stream that cannot be sought."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from retex_cli.errors import UsageError
from retex_cli.io.layout import Shard
from retex_cli.io.replace import create, write_all


class Sink(Protocol):
    """Takes the bytes of numbered files at positions in them."""

    in_order: bool
    """Whether bytes have to come in the order of their positions, from one thread at a time."""

    def put(self, shard: int, position: int, view: memoryview) -> None:
        """Write these bytes at this position of this file."""

    def patch(self, old: bytes, new: bytes) -> None:
        """Replace equally long bytes in the header of every file; ValueError unless each has them exactly once."""


LARGE = 1 << 18
"""Bytes from which on a piece is worth a request of its own to the disk."""


class Files:
    """Files written at positions, created in order; their headers are kept so that they can be patched.

    The kernel is told to begin with what was written, so that little is left for the last flush.
    """

    in_order = False

    def __init__(self, paths: Sequence[Path], shards: Sequence[Shard]) -> None:
        self._headers = [bytearray(shard.header) for shard in shards]
        self._paths = paths
        self._fds: list[int] = []
        self._lock = threading.Lock()

    def put(self, shard: int, position: int, view: memoryview) -> None:
        """Write at a position; files up to this one are created with their headers."""
        with self._lock:
            self.create_up_to(shard)
        write_all(self._fds[shard], view, position)
        _begin_flush(self._fds[shard], position, len(view))

    def create_up_to(self, shard: int) -> None:
        """Create the files up to this one, with their headers."""
        while len(self._fds) <= shard:
            k = len(self._fds)
            self._fds.append(create(self._paths[k]))
            write_all(self._fds[k], memoryview(self._headers[k]), 0)

    def patch(self, old: bytes, new: bytes) -> None:
        """Replace equally long bytes in every header, wherever they are in it, written already or not."""
        for path, header in zip(self._paths, self._headers, strict=True):
            if old not in header:
                raise ValueError(f"{old!r} is not in the header of {path.name}")
        for k, header in enumerate(self._headers):
            header[:] = header.replace(old, new)
            if k < len(self._fds):
                write_all(self._fds[k], memoryview(header), 0)

    def flush(self) -> None:
        """Everything to the disk, files without data included."""
        self.create_up_to(len(self._paths) - 1)
        for fd in self._fds:
            os.fsync(fd)

    def close(self) -> None:
        """Give back the files."""
        while self._fds:
            os.close(self._fds.pop())


def _begin_flush(fd: int, position: int, count: int) -> None:
    """Begin to write these bytes out, waiting for nothing: pages that are on their way to the disk stay in memory.

    That is what this advice does to bytes just written. Where it is unknown they go with the last flush, as small
    pieces do, which share their pages with what is written next.
    """
    if count >= LARGE and hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # it is only advice
            os.posix_fadvise(fd, position, count, os.POSIX_FADV_DONTNEED)


class Stream:
    """Bytes in order to a stream."""

    in_order = True

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def put(self, shard: int, position: int, view: memoryview) -> None:
        """Write the next bytes; the caller knows that they are the next ones."""
        del shard, position
        done = 0
        while done < len(view):
            done += self._stream.write(view[done:]) or 0

    def patch(self, old: bytes, new: bytes) -> None:
        """Always ValueError: the header has gone."""
        raise ValueError("the header has already gone to standard output")


def standard_output() -> BinaryIO:
    """The bytes side of standard output. UsageError when it is a terminal."""
    if sys.stdout.isatty():
        raise UsageError("refusing to write a checkpoint to a terminal", "redirect it: -o - > name.safetensors")
    sys.stdout.flush()
    stream: BinaryIO = sys.stdout.buffer
    return stream
