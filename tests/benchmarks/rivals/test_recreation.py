"""The re-created predictor: exact where there is room for everything, shared where there is not."""

from __future__ import annotations

import pytest
import torch
from rivals import recreation
from rivals.form import Case, Known

TASKS = ("a", "b", "c", "d")


def case_of(offsets: torch.Tensor) -> Case:
    """One matrix, offsets ``[T, m, n]`` from a merged zero."""
    zero = {"w": torch.zeros(offsets.shape[1:])}
    return Case(Known(zero, zero), {task: {"w": offset} for task, offset in zip(TASKS, offsets, strict=True)}, dict)


def left_over(case: Case, components: int, width: int, rounds: int = 12) -> float:
    files = recreation.encode(case, components, width, rounds)
    found = torch.stack([recreation.decode(case.known, files, task)["w"] for task in TASKS])
    wanted = torch.stack([expert["w"] for expert in case.experts.values()])
    return float((found - wanted).square().sum() / wanted.square().sum())


@pytest.fixture
def shared() -> torch.Tensor:
    """Offsets of all tasks made of the same six directions, with a sum of zero."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(40, 6, generator=generator), torch.randn(30, 6, generator=generator)
    weights = torch.randn(4, 6, generator=generator)
    return torch.einsum("mk,tk,nk->tmn", left, weights - weights.mean(0), right)


def test_directions_that_tasks_share_are_stored_once(shared: torch.Tensor) -> None:
    assert left_over(case_of(shared), 6, 4, rounds=60) < 1e-3
    assert left_over(case_of(shared), 3, 4) > 0.05, "three cannot hold six"


def test_offsets_of_an_average_need_one_dimension_less(shared: torch.Tensor) -> None:
    case = case_of(shared)
    files = recreation.encode(case, 6, 3, 60)
    assert all(len(data) == 8 + 2 * 3 for data in files.tasks.values()), "a task is its embedding"
    assert left_over(case, 6, 3, rounds=60) < 1e-3
    assert left_over(case, 6, 2, rounds=60) > 0.01


def test_room_for_everything_is_exact() -> None:
    case = case_of(torch.randn(4, 40, 30, generator=torch.Generator().manual_seed(1)))
    assert left_over(case, 1000, 4) < 1e-6
    shared = recreation.encode(case, 1000, 4).shared
    assert len(shared) == 8 + 4 + 2 * 4 * 40 * 30, "no larger than the offsets themselves"


def test_every_round_helps() -> None:
    case = case_of(torch.randn(4, 40, 30, generator=torch.Generator().manual_seed(1)))
    for width in (4, 2):
        first, some, many = (left_over(case, 8, width, rounds) for rounds in (1, 4, 16))
        assert 1 > first > some > many


def test_one_component_a_task_begins_at_its_singular_vectors() -> None:
    offsets = torch.randn(4, 40, 30, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(offsets)
    best = 1 - float(values[:, 0].square().sum() / values.square().sum())
    assert left_over(case_of(offsets), 4, 4) <= best * (1 + 1e-3)
