"""Worker threads of a merge, each on one torch thread, and the progress of passes that they share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from retex_cli.merging.budget import default_threads

A = TypeVar("A")
B = TypeVar("B")


class Pool:
    """Worker threads that each run torch on one thread."""

    def __init__(self, threads: int) -> None:
        self._executor = ThreadPoolExecutor(threads, "merge", initializer=torch.set_num_threads, initargs=(1,))

    def submit(self, function: Callable[[A], B], item: A) -> Future[B]:
        """Run ``function(item)`` when a thread is free; first come, first served."""
        return self._executor.submit(function, item)

    def map(self, function: Callable[[A], B], items: Iterable[A]) -> list[B]:
        """Results in order. The caller lends a hand with what no thread has begun, so a worker may call it too."""
        return list(self.results(function, items))

    def results(self, function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
        """The same, one by one."""
        for item, future in [(item, self.submit(function, item)) for item in items]:
            yield function(item) if future.cancel() else future.result()

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
        todo, done = list(items), []
        self.begin("first pass", len(todo))
        for result in self.pool.results(function, todo):
            done.append(result)
            self.advance(1)
        return done


@contextmanager
def pool_of(threads: int | None) -> Iterator[Pool]:
    """A pool of workers; this thread's torch runs on one thread meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = Pool(threads or default_threads())
    try:
        yield pool
    finally:
        pool.close()
        torch.set_num_threads(before)
