"""Independent pieces of work side by side, results in order, a bounded number in memory."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def thread_count(threads: int | None) -> int:
    """What ``--threads`` means: that many, or one for each processor this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return threads or usable or 1


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
