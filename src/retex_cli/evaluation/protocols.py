"""The three protocols of expert recovery, kept apart because papers mix them.

K: task and head are known. E: the encoder is the identified task's, the head the true one. H: encoder and head are both
the identified task's, and answers are compared as label names. Identification is forced to the nearest task; the
second reading lets it say "unknown", which counts as a wrong answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PROTOCOLS = ("K", "E", "H")

Answers = NDArray[np.object_]
"""Label names, one per input."""


@dataclass(frozen=True)
class TaskAnswers:
    """What everybody answered on one task's test inputs; all arrays have one entry per input.

    ``K``, ``E``, ``H`` are the recovered experts' answers under that protocol, None where it was not run.
    ``identified``: names of identified tasks; ``unknown``: where identification would rather have said nothing.
    """

    task: str
    truth: Answers
    expert: Answers
    merged: Answers
    recovered: Mapping[str, Answers]
    identified: Answers | None
    unknown: NDArray[np.bool_] | None


@dataclass(frozen=True)
class TaskScores:
    """Fractions of one task's test inputs. ``with_unknown``: ``identified`` (as ``task``) and the answers under E and H
    where an input that was called unknown counts as wrong."""

    task: str
    inputs: int
    expert: float
    merged: float
    recovered: Mapping[str, float]
    agreement: Mapping[str, float]
    identified: float | None
    unknown: float | None
    with_unknown: Mapping[str, float]

    def normalised(self, accuracy: float) -> float:
        """Share of the expert's own accuracy; 1 where the expert is never right and neither is the other."""
        if self.expert == 0:
            return 1.0 if accuracy == 0 else float("inf")
        return accuracy / self.expert

    def of_known(self) -> dict[str, float]:
        """The protocols as shares of K, what identification alone costs; empty where K was not run."""
        known = self.recovered.get("K")
        if known is None:
            return {}
        same = {name: 1.0 if value == known else float("inf") for name, value in self.recovered.items()}
        return {name: value / known for name, value in self.recovered.items()} if known else same


def score(answers: TaskAnswers) -> TaskScores:
    """Accuracies, agreement with the expert's own answers, and identification of one task."""
    right = {name: given == answers.truth for name, given in answers.recovered.items()}
    known = None if answers.unknown is None else ~answers.unknown
    return TaskScores(
        task=answers.task,
        inputs=len(answers.truth),
        expert=_share(answers.expert == answers.truth),
        merged=_share(answers.merged == answers.truth),
        recovered={name: _share(hits) for name, hits in right.items()},
        agreement={
            "merged": _share(answers.merged == answers.expert),
            **{name: _share(given == answers.expert) for name, given in answers.recovered.items()},
        },
        identified=None if answers.identified is None else _share(answers.identified == answers.task),
        unknown=None if answers.unknown is None else _share(answers.unknown),
        with_unknown={}
        if known is None
        else {
            "task": _share((answers.identified == answers.task) & known),
            **{name: _share(hits & known) for name, hits in right.items() if name != "K"},
        },
    )


def _share(hits: object) -> float:
    return float(np.mean(np.asarray(hits, dtype=bool)))


def mean_scores(scores: Sequence[TaskScores]) -> dict[str, object]:
    """Means over tasks; normalised accuracy is the mean of the tasks' ratios, its worst task stands beside it."""
    protocols = list(scores[0].recovered)
    ratios = {name: [s.normalised(s.recovered[name]) for s in scores] for name in protocols}
    identified = [s.identified for s in scores if s.identified is not None]
    return {
        "expert": _mean([s.expert for s in scores]),
        "merged": _mean([s.merged for s in scores]),
        "recovered": {name: _mean([s.recovered[name] for s in scores]) for name in protocols},
        "normalised": {
            "merged": _mean([s.normalised(s.merged) for s in scores]),
            **{name: _mean(values) for name, values in ratios.items()},
        },
        "worst": {
            "merged": min(s.normalised(s.merged) for s in scores),
            **{name: min(values) for name, values in ratios.items()},
        },
        "agreement": {name: _mean([s.agreement[name] for s in scores]) for name in ["merged", *protocols]},
        "of_known": {name: _mean([s.of_known()[name] for s in scores]) for name in scores[0].of_known()},
        "identified": _mean(identified) if identified else None,
        "unknown": _mean([s.unknown for s in scores if s.unknown is not None]) if identified else None,
        "with_unknown": {
            name: _mean([s.with_unknown[name] for s in scores]) for name in (scores[0].with_unknown or {})
        },
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
