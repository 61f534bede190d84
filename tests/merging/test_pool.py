"""Workers: as many threads compute as were asked for, and none waits for itself."""

from __future__ import annotations

import threading
import time

import torch

from retex_cli.merging.pool import Pool, Watched, open_pool


def test_the_caller_does_not_compute_beside_the_workers_it_asked_for() -> None:
    def where(_: int) -> int:
        time.sleep(0.001)  # long enough for a caller that helps to take the next one
        return threading.get_ident()

    with open_pool(1) as pool:
        assert set(pool.map(where, range(20))).isdisjoint({threading.get_ident()})


def test_a_map_inside_a_worker_does_not_wait_for_itself() -> None:
    pool = Pool(1)
    nested = pool.submit(lambda n: pool.map(lambda i: i * i, range(n)), 5)
    assert nested.result(timeout=10) == [0, 1, 4, 9, 16]
    pool.close()


def test_a_watched_map_tells_its_length_and_every_step() -> None:
    pool, seen = Pool(2), []
    watched = Watched(
        pool, lambda label, total: seen.append((label, total)), lambda steps: seen.append(("step", steps))
    )
    assert watched(lambda i: i * i, range(3)) == [0, 1, 4]
    assert seen == [("first pass", 3), ("step", 1), ("step", 1), ("step", 1)]
    pool.close()


def test_torch_runs_on_one_thread_inside_and_on_as_many_as_before_afterwards() -> None:
    before = torch.get_num_threads()
    with open_pool(2) as pool:
        assert pool.map(lambda _: torch.get_num_threads(), range(4)) == [1] * 4
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
