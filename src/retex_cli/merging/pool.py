"""Worker threads for merging: as many as asked for, and no more at work at once."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from retex_cli.merging.budget import default_threads

A = TypeVar("A")
B = TypeVar("B")


LARGE = 1 << 21
"""Bytes from which on freed memory goes back to the system at once."""
_M_MMAP_THRESHOLD = -3


def give_back_large() -> None:
    """Have glibc return every large block when it is freed, wherever it came from; others do so anyway.

    Left alone it raises its bound with every large block that is freed, up to 32 MB, and from then on keeps what
    spectral decompositions freed in one heap per thread: two to three times what is in use.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, LARGE)


class _Here(threading.local):
    """Is this thread one of a pool's workers?"""

    working = False


_here = _Here()


def _begin() -> None:
    _here.working = True
    torch.set_num_threads(1)


class Pool:
    """Worker threads that each run torch on one thread."""

    def __init__(self, threads: int) -> None:
        self._executor = ThreadPoolExecutor(threads, "merge", initializer=_begin)

    def submit(self, function: Callable[[A], B], item: A) -> Future[B]:
        """Run ``function(item)`` when a thread is free; first come, first served."""
        return self._executor.submit(function, item)

    def map(self, function: Callable[[A], B], items: Iterable[A]) -> list[B]:
        """Results in order. A worker that calls this does what no other has begun, so it never waits for itself."""
        pending = [(item, self.submit(function, item)) for item in items]
        return [function(i) if _here.working and future.cancel() else future.result() for i, future in pending]

    def close(self) -> None:
        """Drop what has not begun and wait for the rest."""
        self._executor.shutdown(cancel_futures=True)


@contextmanager
def open_pool(threads: int | None) -> Iterator[Pool]:
    """A pool of workers, one per core unless told; this thread's torch runs on one thread meanwhile."""
    give_back_large()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = Pool(threads or default_threads())
    try:
        yield pool
    finally:
        pool.close()
        torch.set_num_threads(before)
