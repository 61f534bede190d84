"""Independent pieces of work side by side, results in order, a bounded number in memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

LARGE = 1 << 22
"""Bytes from which on freed memory goes back to the system at once."""
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1


def thread_count(threads: int | None) -> int:
    """What ``--threads`` means: that many, or one for each processor this process may use."""
    return threads or len(os.sched_getaffinity(0))


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Linear algebra on one thread: its bits change with the number of threads, and ours must not."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int, waiting_results: int = 1
) -> Iterator[Result]:
    """``map`` over threads; at most ``waiting_results`` beyond the number of threads wait to be taken.

    More of them, where they are small, keep all threads at work while one has an item that takes long.
    """
    with one_thread_each(), ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= threads + waiting_results:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def give_back_large() -> None:
    """Have glibc return every large block when it is freed, wherever it came from; others do so anyway.

    Left alone it raises its bound with every large block that is freed, up to 32 MB, and from then on keeps what
    spectral decompositions freed in one heap per thread: two to three times what is in use.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, LARGE)
            mallopt(_M_TRIM_THRESHOLD, 4 * LARGE)
