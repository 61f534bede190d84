"""Worker threads: no deadlock, results in order, progress step by step."""

from __future__ import annotations

from retex_cli.merging.pool import Pool, Watched


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
