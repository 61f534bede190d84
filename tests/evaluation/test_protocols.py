"""Scores on a worked example, by hand."""

import numpy as np
import pytest

from retex_cli.errors import UsageError
from retex_cli.evaluation.gates import missed_gates, parse_gates
from retex_cli.evaluation.protocols import TaskAnswers, mean_scores, score


def words(text: str) -> np.ndarray:
    return np.array(text.split(), dtype=object)


@pytest.fixture
def answers() -> TaskAnswers:
    return TaskAnswers(
        task="t",
        truth=words("a a b b"),
        expert=words("a a b a"),
        merged=words("b b b a"),
        recovered={"K": words("a a b b"), "E": words("a b b a"), "H": words("a z b a")},
        identified=words("t u t t"),
        unknown=np.array([False, False, True, False]),
    )


def test_a_worked_example(answers: TaskAnswers) -> None:
    scores = score(answers)
    assert scores.expert == 0.75
    assert scores.merged == 0.25
    assert scores.recovered == {"K": 1.0, "E": 0.5, "H": 0.5}
    assert scores.agreement == {"merged": 0.5, "K": 0.75, "E": 0.75, "H": 0.75}
    assert scores.identified == 0.75
    assert scores.unknown == 0.25
    assert scores.with_unknown == {"task": 0.5, "E": 0.25, "H": 0.25}
    assert scores.of_known() == {"K": 1, "E": 0.5, "H": 0.5}
    assert scores.normalised(scores.merged) == pytest.approx(1 / 3)


def test_means_are_of_ratios_and_the_worst_task_stands_beside(answers: TaskAnswers) -> None:
    other = TaskAnswers("u", words("a"), words("a"), words("a"), {"K": words("b")}, None, None)
    first = TaskAnswers("t", answers.truth, answers.expert, answers.merged, {"K": answers.expert}, None, None)
    mean = mean_scores([score(first), score(other)])
    assert mean["normalised"] == {"merged": pytest.approx((1 / 3 + 1) / 2), "K": 0.5}
    assert mean["worst"] == {"merged": pytest.approx(1 / 3), "K": 0.0}
    assert mean["identified"] is None


def test_gates_are_percent_of_the_experts() -> None:
    gates = parse_gates("99,worst=97,H=95")
    assert gates == {"K": 99, "worst": 97, "H": 95}
    assert missed_gates(gates, {"K": 0.99, "H": 0.95}, 0.97) == []
    missed = missed_gates(gates, {"K": 0.991, "H": 0.9499}, 0.9)
    assert len(missed) == 2
    assert "94.99" in missed[1] or "94.99" in missed[0]


@pytest.mark.parametrize("text", ["", "x", "Q=3", "K="])
def test_gates_that_cannot_be_meant(text: str) -> None:
    with pytest.raises(UsageError):
        parse_gates(text)
