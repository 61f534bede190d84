"""One budget for several tasks goes where it does most good; the smallest budget that is good enough is found."""

from __future__ import annotations

import numpy as np
import pytest

from retex_cli.offsets.allocate import Candidates, allocate
from retex_cli.offsets.quantiser import LEVELS, NORMAL
from retex_cli.offsets.shares import FINEST, share_again, share_out, smallest


def tensor(energies: list[float], entries: int = 100) -> Candidates:
    return Candidates(np.array(energies), 1 - NORMAL.distortions[:LEVELS], 6 + entries * NORMAL.rates[:LEVELS])


def lost(task: list[Candidates], budget: int) -> float:
    levels = allocate(task, 8.0 * budget)
    kept = sum(
        c.energies[i] * c.kept[level] for c, chosen in zip(task, levels, strict=True) for i, level in enumerate(chosen)
    )
    return sum(float(c.energies.sum()) for c in task) - kept


EASY = [tensor([0.1 * 0.5**k for k in range(20)]), tensor([])]
HARD = [tensor([9.0] * 20), tensor([4.0] * 20)]


def test_what_is_shared_out_loses_less_than_equal_parts() -> None:
    shares = share_out([EASY, HARD], [10, 10], 2000)
    assert sum(shares) <= 2000
    assert sum(shares) > 1990
    assert shares[1] > 5 * shares[0]
    assert lost(EASY, shares[0]) + lost(HARD, shares[1]) < 0.9 * (lost(EASY, 1000) + lost(HARD, 1000))


def test_equal_tasks_get_equal_parts_and_one_task_all() -> None:
    first, second = share_out([HARD, HARD], [10, 10], 2000)
    assert abs(first - second) < 100
    assert share_out([HARD], [10], 2000) == [2000]


def test_every_task_gets_the_least() -> None:
    nothing = [tensor([0.0])]
    shares = share_out([nothing, HARD, HARD], [30, 40, 40], 150)
    assert shares[0] == 30
    assert min(shares[1:]) >= 40
    assert sum(shares) <= 150
    assert share_out([nothing, nothing], [5, 5], 10) == [5, 5]
    with pytest.raises(ValueError, match="110 bytes are the least"):
        share_out([nothing, HARD, HARD], [30, 40, 40], 109)


def test_distances_move_bytes_to_where_they_lower_the_sum_of_squares_most() -> None:
    shares, distances = [400, 400, 200], [0.2, 0.05, 0.05]
    again = share_again(shares, distances, [1, 1, 1], 1000)
    assert sum(again) in (998, 999, 1000)

    def squares(found: list[int]) -> float:  # of distances that fall in proportion to bytes
        return sum((far * had / has) ** 2 for far, had, has in zip(distances, shares, found, strict=True))

    assert squares(again) < squares(shares)
    for first, second in ((0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)):
        moved = list(again)
        moved[first], moved[second] = moved[first] + 20, moved[second] - 20
        assert squares(again) < squares(moved)


def test_no_task_loses_all_by_one_distance() -> None:
    assert share_again([500, 500], [0.1, 0.0], [20, 30], 1000) == [875, 125]
    assert share_again([900, 100], [0.1, 0.0], [20, 30], 1000) == [970, 30]
    for unusable in ([0.0, 0.0], [0.1, float("nan")]):
        assert share_again([600, 400], unusable, [20, 30], 1000) == [600, 400]


class Codec:
    """Bytes are as many as the budget; the score is what the rule says of them."""

    def __init__(self, enough: int) -> None:
        self.enough, self.tried = enough, list[int]()

    def code(self, budget: int) -> bytes:
        self.tried.append(budget)
        return bytes(budget)

    def score(self, data: bytes) -> float:
        return min(1.0, len(data) / self.enough)


@pytest.mark.parametrize("enough", [20, 21, 500, 4097, 100_000])
def test_the_smallest_that_is_enough(enough: int) -> None:
    codec = Codec(enough)
    found = smallest(codec.code, codec.score, 1.0, 20, 100_000)
    assert enough <= found.budget <= max(FINEST * enough, enough + 1)
    assert len(found.data) == found.budget
    assert found.score == 1
    assert len(codec.tried) < 25


def test_what_is_out_of_reach_is_told_by_its_score() -> None:
    codec = Codec(1000)
    found = smallest(codec.code, codec.score, 1.0, 20, 900)
    assert (found.budget, found.score) == (900, 0.9)
    assert smallest(codec.code, codec.score, 0.5, 2000, 900).budget == 900
