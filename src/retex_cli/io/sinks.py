"""Where a writer's bytes go: positioned writes to files, or one stream that cannot be sought."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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


#: Bytes written between two flushes that run beside the work, so that little is left for the last one.
FLUSH_EVERY = 1 << 26


class Files:
    """Files written at positions, created in order; their headers are kept so that they can be patched.

    What is written goes on to the disk from a thread of its own; an error there shows at the next ``put`` or ``flush``.
    """

    in_order = False

    def __init__(self, paths: Sequence[Path], shards: Sequence[Shard]) -> None:
        self._headers = [bytearray(shard.header) for shard in shards]
        self._paths = paths
        self._fds: list[int] = []
        self._pool = ThreadPoolExecutor(1, "flush")
        self._flushing: Future[None] | None = None
        self._unflushed = 0
        self._lock = threading.Lock()

    def put(self, shard: int, position: int, view: memoryview) -> None:
        """Write at a position; files up to this one are created with their headers."""
        with self._lock:
            self.create_up_to(shard)
        write_all(self._fds[shard], view, position)
        with self._lock:
            self._unflushed += len(view)
            if self._unflushed >= FLUSH_EVERY and (self._flushing is None or self._flushing.done()):
                self._wait()
                self._flushing = self._pool.submit(os.fsync, self._fds[shard])
                self._unflushed = 0

    def _wait(self) -> None:
        """Until the flush under way is done; OSError if it failed."""
        if self._flushing is not None:
            self._flushing.result()

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
        self._wait()
        self.create_up_to(len(self._paths) - 1)
        for fd in self._fds:
            os.fsync(fd)

    def close(self) -> None:
        """Give back the files."""
        self._pool.shutdown()
        while self._fds:
            os.close(self._fds.pop())


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
