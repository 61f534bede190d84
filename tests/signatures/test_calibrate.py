from __future__ import annotations

import math

import pytest
import torch

from retex_cli.signatures.calibrate import Alarm, Tail, entropy, fit_temperature, losses, wilson


def drawn(tasks: int, count: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores whose owners were drawn from their own softmax at ``temperature``."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(count, tasks, generator=generator, dtype=torch.float64) * 3 * temperature
    chances = torch.softmax(-scores / temperature, 1)
    return scores, torch.multinomial(chances, 1, generator=generator)[:, 0]


@pytest.mark.parametrize("temperature", [0.02, 1.0, 40.0])
def test_the_temperature_that_made_the_labels_is_found(temperature: float) -> None:
    scores, owner = drawn(4, 8000, temperature)
    assert fit_temperature(scores, owner) == pytest.approx(temperature, rel=0.06)


def test_inputs_are_as_sure_as_they_are_right() -> None:
    scores, owner = drawn(3, 200, 5.0)
    sure = torch.softmax(-scores / fit_temperature(scores, owner), 1).amax(1).mean().item()
    assert sure == pytest.approx(((scores.argmin(1) == owner).sum().item() + 1) / 202, abs=1e-6)


def test_a_far_task_does_not_make_near_ones_unsure() -> None:
    """Two tasks apart by 10 and a third by 10,000: every input is right, and none is less sure for the third's sake."""
    scores = torch.tensor([[0.0, 10.0, 1e4], [10.0, 0.0, 1e4], [1e4, 1e4, 0.0]]).double().repeat_interleave(50, 0)
    owner = torch.arange(3).repeat_interleave(50)
    chances = torch.softmax(-scores / fit_temperature(scores, owner), 1).gather(1, owner[:, None])
    assert chances.min() > 0.98
    assert losses(scores, owner, fit_temperature(scores, owner)).mean() < 0.01


def test_never_surer_than_the_inputs_allow() -> None:
    """50 inputs, all right by far: still a chance of about 1 in 52 to be wrong."""
    scores = torch.tensor([[0.0, 10.0]], dtype=torch.float64).repeat(50, 1)
    temperature = fit_temperature(scores, torch.zeros(50, dtype=torch.int64))
    assert torch.softmax(-scores[0] / temperature, 0)[0].item() == pytest.approx(51 / 52, abs=1e-4)


def test_one_task_needs_no_temperature() -> None:
    assert fit_temperature(torch.randn(9, 1).double(), torch.zeros(9, dtype=torch.int64)) == 1.0


def test_entropy_in_nats() -> None:
    scores = torch.tensor([[0.0, 0.0], [0.0, 1e6], [0.0, 2 * math.log(3)]])
    sure = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    torch.testing.assert_close(entropy(scores, 2.0), torch.tensor([math.log(2), 0.0, sure]).double())


def test_surprise_counts_the_references_that_look_as_strange() -> None:
    tail = Tail.of(torch.arange(100.0))
    found = tail.surprise(torch.tensor([-5.0, 0.0, 49.5, 80.0]))
    shares = torch.tensor([101, 101, 51, 21]) / 101
    torch.testing.assert_close(found, -shares.double().log())


def test_surprise_grows_without_end_and_without_jumps() -> None:
    tail = Tail.of(torch.randn(500, generator=torch.Generator().manual_seed(1)).exp())
    grid = tail.surprise(torch.linspace(tail.start, 100, 100_000))
    assert (grid.diff() > 0).all()
    assert grid.diff().max() < 0.01
    assert grid[-1] > 20
    assert tail.surprise(torch.tensor([tail.start])).item() == pytest.approx(grid[0].item())


def test_identical_references_forgive_rounding_only() -> None:
    tail = Tail.of(torch.zeros(32))
    near, far = tail.surprise(torch.tensor([1e-4, 1.0]))
    assert near < 0.1
    assert far > 50


def test_the_alarm_keeps_its_rate_on_fresh_inputs() -> None:
    generator = torch.Generator().manual_seed(5)
    known, fresh = (-torch.rand(2, count, generator=generator).log().sum(0) for count in (2000, 20_000))
    alarm = Alarm.of(known, 0.05)
    assert alarm.expected == pytest.approx(0.05, abs=1e-3)
    assert alarm.interval[0] < (fresh > alarm.threshold).double().mean() < alarm.interval[1]


def test_32_inputs_cannot_resolve_one_percent_and_say_so() -> None:
    alarm = Alarm.of(torch.arange(32.0), 0.01)
    assert alarm.threshold == 31.0
    assert alarm.expected == pytest.approx(1 / 33)
    assert alarm.interval[0] == 0.0
    assert 0.08 < alarm.interval[1] < 0.12


def test_references_without_any_surprise_set_a_mark_all_the_same() -> None:
    assert Alarm.of(torch.zeros(50), 0.01).threshold == pytest.approx(math.log(100))


def test_the_mean_of_many_needs_less() -> None:
    alarm = Alarm.of(torch.arange(101.0), 0.01)
    assert alarm.threshold_of_mean(1) == alarm.threshold
    assert alarm.threshold_of_mean(4) == pytest.approx(50 + (alarm.threshold - 50) / 2)
    assert alarm.threshold_of_mean(10_000) == pytest.approx(50 + (alarm.threshold - 50) / 4)


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"), [(5, 10, 0.2366, 0.7634), (0, 10, 0.0, 0.2775), (1, 100, 0.0018, 0.0545)]
)
def test_wilson_intervals(hits: int, count: int, low: float, high: float) -> None:
    assert wilson(hits, count) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
