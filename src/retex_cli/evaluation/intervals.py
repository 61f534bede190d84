"""95 % intervals by bootstrap over the test inputs of each task (Efron 1979, percentiles).

A ratio is drawn as a ratio, both sides from the same inputs. Inputs count only by the pattern of who is right on them,
so a sample of inputs is a multinomial draw over the patterns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from retex_cli.evaluation.protocols import TaskAnswers

DRAWS = 2000
SIDES = (2.5, 97.5)

Interval = tuple[float, float]
Shares = dict[str, NDArray[np.float64]]


def intervals(answers: Sequence[TaskAnswers]) -> tuple[dict[str, dict[str, Interval]], dict[str, Interval]]:
    """Per task, and for the means over tasks: figure -> (low, high).

    A figure has the dotted name of its place in the report: ``recovered.K``, ``normalised.K``, ``identified`` …
    """
    drawn = {one.task: _draws(one, seed) for seed, one in enumerate(answers)}
    names = next(iter(drawn.values())).keys()
    means = {name: np.mean([shares[name] for shares in drawn.values()], axis=0) for name in names}
    return {task: _between(shares) for task, shares in drawn.items()}, _between(means)


def _between(shares: Mapping[str, NDArray[np.float64]]) -> dict[str, Interval]:
    found = {name: np.percentile(values, SIDES) for name, values in shares.items()}
    return {name: (float(low), float(high)) for name, (low, high) in found.items()}


def _draws(answers: TaskAnswers, seed: int) -> Shares:
    """Every figure [DRAWS] on samples of one task's inputs."""
    hits = _hits(answers)
    patterns, counts = np.unique(np.stack(list(hits.values()), 1), axis=0, return_counts=True)
    total = int(counts.sum())
    drawn = np.random.default_rng(seed).multinomial(total, counts / total, DRAWS) @ patterns / total
    shares: Shares = dict(zip(hits, drawn.T, strict=True))
    for name in ("merged", *(f"recovered.{protocol}" for protocol in answers.recovered)):
        shares[f"normalised.{name.removeprefix('recovered.')}"] = _ratio(shares[name], shares["expert"])
    if "recovered.K" in shares:
        for protocol in answers.recovered:
            shares[f"of_known.{protocol}"] = _ratio(shares[f"recovered.{protocol}"], shares["recovered.K"])
    return shares


def _hits(answers: TaskAnswers) -> dict[str, NDArray[np.bool_]]:
    found = {"expert": answers.expert == answers.truth, "merged": answers.merged == answers.truth}
    found |= {f"recovered.{name}": given == answers.truth for name, given in answers.recovered.items()}
    if answers.identified is not None and answers.unknown is not None:
        known = ~answers.unknown
        found |= {"identified": answers.identified == answers.task, "unknown": answers.unknown}
        found["with_unknown.task"] = found["identified"] & known
        for name in answers.recovered:
            if name != "K":
                found[f"with_unknown.{name}"] = found[f"recovered.{name}"] & known
    return {name: np.asarray(hits, dtype=bool) for name, hits in found.items()}


def _ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 where nothing is above nothing."""
    nothing = below == 0
    return np.where(nothing, np.where(above == 0, 1.0, np.inf), above / np.where(nothing, 1.0, below))
