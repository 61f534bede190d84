"""Worker threads of a merge: as many as asked for, no more at work at once, and the progress of their passes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from retex_cli.allocator import give_back_large

A = TypeVar("A")
B = TypeVar("B")


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
        return list(self.results(function, items))

    def results(self, function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
        """The same, one by one."""
        for item, future in [(item, self.submit(function, item)) for item in items]:
            yield function(item) if _here.working and future.cancel() else future.result()

    def close(self) -> None:
        """Drop what has not begun and wait for the rest."""
        self._executor.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Watched:
    """The map of a pass over the whole model: whoever waits for it is told how far it is."""

    pool: Pool
    begin: Callable[[str, int], None]
    advance: Callable[[int], None]

    def __call__(self, function: Callable[[A], B], items: Iterable[A]) -> list[B]:
        todo = list(items)
        return self._told(self.pool.results(function, todo), len(todo))

    def one_by_one(self, function: Callable[[A], B], items: Iterable[A]) -> list[B]:
        """On the calling thread, for what is too large to be at hand twice."""
        todo = list(items)
        return self._told(map(function, todo), len(todo))

    def _told(self, results: Iterable[B], count: int) -> list[B]:
        done = []
        self.begin("first pass", count)
        for result in results:
            done.append(result)
            self.advance(1)
        return done


@contextmanager
def open_pool(threads: int) -> Iterator[Pool]:
    """A pool of workers, one per core unless told; this thread's torch runs on one thread meanwhile."""
    give_back_large()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = Pool(threads)
    try:
        yield pool
    finally:
        pool.close()
        torch.set_num_threads(before)
