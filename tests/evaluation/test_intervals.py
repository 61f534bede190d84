"""Bootstrap intervals: those of a plain bootstrap, ratios on the same inputs, none where nothing varies."""

from __future__ import annotations

import numpy as np
import pytest

from retex_cli.evaluation.intervals import DRAWS, intervals
from retex_cli.evaluation.protocols import TaskAnswers


def answers(task: str, count: int, shares: dict[str, float], seed: int = 0) -> TaskAnswers:
    """Truth "a" everywhere; each side is right on a random share of the inputs."""
    draw = np.random.default_rng(seed)
    sides = {name: np.where(draw.random(count) < share, "a", "b").astype(object) for name, share in shares.items()}
    found = np.where(draw.random(count) < 0.9, task, "other").astype(object)
    truth = np.full(count, "a", dtype=object)
    recovered = {name: sides[name] for name in ("K", "E") if name in sides}
    return TaskAnswers(task, truth, sides["expert"], sides["merged"], recovered, found, draw.random(count) < 0.1)


def test_intervals_are_those_of_resampled_inputs() -> None:
    one = answers("t", 150, {"expert": 0.8, "merged": 0.5, "K": 0.7, "E": 0.6})
    found, _ = intervals([one])
    draw = np.random.default_rng(7)
    expert, known = one.expert == "a", one.recovered["K"] == "a"
    rows = draw.integers(150, size=(DRAWS, 150))
    plain = {"expert": expert[rows].mean(1), "normalised.K": known[rows].mean(1) / expert[rows].mean(1)}
    for name, values in plain.items():
        assert found["t"][name] == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=0.02), name


def test_a_ratio_of_equal_answers_has_no_width_and_means_are_narrower() -> None:
    same = answers("t", 60, {"expert": 0.7, "merged": 0.4, "K": 0.7})
    same = TaskAnswers("t", same.truth, same.expert, same.merged, {"K": same.expert}, None, None)
    found, mean = intervals([same])
    assert found["t"]["normalised.K"] == (1, 1)
    assert "identified" not in found["t"]
    many = [answers(f"t{k}", 60, {"expert": 0.7, "merged": 0.4, "K": 0.6, "E": 0.5}, seed=k) for k in range(4)]
    found, mean = intervals(many)
    width = {name: high - low for name, (low, high) in mean.items()}
    for name in ("expert", "recovered.E", "of_known.E", "identified", "with_unknown.E", "with_unknown.task"):
        assert width[name] < np.mean([high - low for low, high in (f[name] for f in found.values())])
        assert width[name] > 0
    assert mean["with_unknown.task"][1] < mean["identified"][1]


def test_an_expert_that_is_never_right() -> None:
    found, _ = intervals([answers("t", 20, {"expert": 0.0, "merged": 0.0, "K": 0.0})])
    assert found["t"]["normalised.merged"] == (1, 1)
