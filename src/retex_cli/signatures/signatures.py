"""Fitted signatures: which task is this input, how sure is that, and is it none of them?"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch

from retex_cli.errors import RetexError
from retex_cli.signatures import storage
from retex_cli.signatures.calibrate import Alarm, entropy, fit_temperature
from retex_cli.signatures.features import Layout, check, check_layout, concatenate, unit_layers, vectors
from retex_cli.signatures.join import join, left_out_scores
from retex_cli.signatures.recipe import Recipe, read_recipe, read_recognised
from retex_cli.signatures.scorer import GaussianScorer, OwnDistance, ResidualScorer
from retex_cli.signatures.storage import StoredTask
from retex_cli.signatures.strangeness import Strangeness, nearest_distance

SOFTNESS = 4.0
"""Temperatures at which experts are mixed, in units of the one at which probabilities are calibrated: on tasks that
nobody merged such a mix is worth more than a sharper one (``benchmarks/unseen.py``)."""

UNSURE = 0.9
"""Probability of the nearest task below which several experts answer instead of one."""
ASKED = 2
"""How many those are."""
HEDGE = 2.0
"""Temperatures at which they are weighed, in units of the one at which probabilities are calibrated. All three were
chosen on training rows that are no references: they serve with a head that is given and with the experts' own."""


@dataclass(frozen=True, slots=True, eq=False)
class Decisions:
    """One entry per input, or one for a whole batch that shares a task.

    ``task`` int64 [m], the index of the nearest task, decided even where ``unknown`` bool [m] says that no task fits;
    ``probability`` float64 [m] of that task among all, calibrated; ``margin`` float32 [m], by how much the second best
    score is larger (infinite with a single task); ``embedding`` float64 [m, T], the soft task embedding
    ``softmax(-score / temperature)`` (arXiv 2606.26902) at ``SOFTNESS`` times the temperature of probabilities;
    ``shares`` float64 [m, T] says which experts are asked and how much the answer of each counts: the nearest task's
    alone, or where ``probability`` is under ``UNSURE`` the ``ASKED`` nearest by ``softmax(-score / temperature)`` at
    ``HEDGE`` times the temperature. The soft expert of the same paper is one network of mixed weights for every input;
    here answers are mixed, as half of two experts' offsets is often neither's expert;
    ``surprise`` float64 [m] in nats, how rarely a known input looks as strange: its -log p.
    """

    task: torch.Tensor
    probability: torch.Tensor
    margin: torch.Tensor
    unknown: torch.Tensor
    embedding: torch.Tensor
    shares: torch.Tensor
    surprise: torch.Tensor


@dataclass(frozen=True, eq=False)
class Signatures:
    """Statistics of every task, and the recipe that says how to use them. Immutable; ``stored`` is sorted by name.

    ``recognised``: per task the share of its reference inputs that were named right when each was left out, among the
    tasks there were when it was fitted or added.
    """

    recipe: Recipe
    stored: Mapping[str, StoredTask]
    recognised: Mapping[str, float]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names, in the order of every task index."""
        return tuple(self.stored)

    @property
    def layout(self) -> Layout:
        """Which layers make a vector, and how."""
        return self.recipe.layout

    def score(self, features: torch.Tensor) -> torch.Tensor:
        """Float32 ``[m, T]``, smaller is closer, of floating ``features`` [m >= 1, L, D], pooled but not normalised.

        RetexError where they are not finite, or of another shape than those the signatures were fitted on.
        """
        return self._scorer.scores(self._rows(features))

    def identify(self, features: torch.Tensor) -> Decisions:
        """Every input of ``features`` [m, L, D] by itself."""
        rows = self._rows(features)
        scores = self._scorer.scores(rows)
        return self._decide(scores, self._surprise(rows, scores), self.alarm.threshold)

    def identify_batch(self, features: torch.Tensor) -> Decisions:
        """All m inputs of ``features`` [m, L, D] together, which share a task: one entry, from the summed scores.

        ``probability`` takes the inputs as independent. Unknown when their mean surprise is too large for m inputs.
        """
        rows = self._rows(features)
        scores = self._scorer.scores(rows)
        surprise = self._surprise(rows, scores).mean(0, keepdim=True)
        return self._decide(scores.sum(0, keepdim=True), surprise, self.alarm.threshold_of_mean(len(rows)))

    def soft(self, features: torch.Tensor, temperature: float | None = None) -> torch.Tensor:
        """Task embedding ``e = softmax(-score / temperature)``, float64 [m, T]; by default at ``SOFTNESS``."""
        return torch.softmax(-self.score(features).double() / (temperature or SOFTNESS * self.recipe.temperature), 1)

    @cached_property
    def alarm(self) -> Alarm:
        """When an input counts as unknown, and the false-alarm rate that the reference inputs resolve."""
        return Alarm.of(self._calibration[:, 2], self.recipe.false_alarms)

    def remove(self, task: str) -> Self:
        """Without one task; the others' arrays stay as they are. RetexError for an unknown or the last task."""
        if task not in self.stored:
            close = difflib.get_close_matches(task, self.stored, n=3)
            known = "close: " if close else "known: "
            raise RetexError(f"no signature of task {task!r}", known + ", ".join(close or self.stored))
        if len(self.stored) == 1:
            raise RetexError(f"task {task!r} is the only one", "Delete the file instead.")
        keep = {name: part for name, part in self.stored.items() if name != task}
        return type(self)(self.recipe, keep, {name: self.recognised[name] for name in keep})

    def add(self, task: str, features: torch.Tensor) -> Self:
        """With one more task, from its ``features`` [n >= 2, L, D] alone; the others' arrays stay as they are.

        Layers, score and shrinkage stay what they were fitted to be, and so does the temperature, unless there was a
        single task, which needs none. Fit again when the tasks have become others. RetexError for a task that is there
        already, and for features that ``fit`` would refuse.
        """
        if task in self.stored:
            raise RetexError(f"there is a signature of task {task!r} already", "Remove it first, or name it otherwise.")
        check(features, f"task {task!r}", least=2)
        check_layout(features, self.layout, f"task {task!r}")
        rows = concatenate(unit_layers(features.cpu()), self.layout)
        others = list(self.stored.values())
        scores = left_out_scores(self.recipe, rows, [part.scatter() for part in others])
        recipe = self.recipe
        if len(others) == 1:
            recipe = replace(recipe, temperature=fit_temperature(scores, torch.ones(len(rows), dtype=torch.int64)))
        part, share = join(recipe, rows, scores, others)
        parts, shares = {**self.stored, task: part}, {**self.recognised, task: share}
        names = sorted(parts)
        return type(self)(recipe, {name: parts[name] for name in names}, {name: shares[name] for name in names})

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """The arrays of every task as ``task/field``, see ``StoredTask``; reference inputs are not among them."""
        return {f"{task}/{name}": t for task, part in self.stored.items() for name, t in part.tensors().items()}

    def to_metadata(self) -> dict[str, object]:
        """The recipe as a JSON object: choices, calibration, and per task the inputs and how many were recognised."""
        return {
            **self.recipe.to_json(),
            "unknown": {
                "surprise": self.alarm.threshold,
                "expected": self.alarm.expected,
                "interval": list(self.alarm.interval),
            },
            "tasks": {
                task: {"inputs": part.count, "recognised": self.recognised[task]} for task, part in self.stored.items()
            },
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, object]) -> Self:
        """From what ``to_tensors`` and ``to_metadata`` gave; scores are the same bit for bit.

        RetexError where a field or tensor is missing or does not fit.
        """
        recipe = read_recipe(metadata)
        recognised = read_recognised(metadata)
        stored = {task: storage.load(task, tensors, recipe.layout.size) for task in recognised}
        return cls(recipe, stored, recognised)

    def describe(self) -> dict[str, object]:
        """The choices in a few words, for a person."""
        recipe, low, high = self.recipe, *self.alarm.interval
        words: dict[str, object] = {"score": recipe.score, "layers": " ".join(map(str, recipe.layout.layers))}
        if recipe.score == "mahalanobis":
            words |= {"shrinkage": recipe.shrinkage, "own share": recipe.own}
        words["temperature"] = f"{recipe.temperature:.3g}"
        words["false alarms"] = f"{100 * self.alarm.expected:.1f} % (95 %: {100 * low:.1f} to {100 * high:.1f})"
        return words

    def _rows(self, features: torch.Tensor) -> torch.Tensor:
        check(features, "the inputs")
        check_layout(features, self.layout, "the inputs")
        return vectors(features.cpu(), self.layout)

    @cached_property
    def _scorer(self) -> GaussianScorer | ResidualScorer:
        parts = [part.scatter() for part in self.stored.values()]
        if self.recipe.score == "residual":
            return ResidualScorer.of(parts)
        return GaussianScorer.of(parts, self.recipe.shrinkage, self.recipe.own)

    @cached_property
    def _own(self) -> tuple[OwnDistance, ...]:
        return tuple(OwnDistance.of(part.scatter()) for part in self.stored.values())

    @cached_property
    def _calibration(self) -> torch.Tensor:
        return torch.cat([part.calibration for part in self.stored.values()]).double()

    @cached_property
    def _strangeness(self) -> Strangeness:
        return Strangeness.of([part.calibration for part in self.stored.values()])

    def _surprise(self, rows: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        distance = nearest_distance(self.recipe, self._own.__getitem__, rows, scores)
        return self._strangeness.surprise(distance, scores.argmin(1), entropy(scores, self.recipe.temperature))

    def _decide(self, scores: torch.Tensor, surprise: torch.Tensor, threshold: float) -> Decisions:
        sure = torch.softmax(scores.double() / -self.recipe.temperature, 1)
        best, places = scores.topk(min(ASKED, len(self.stored)), dim=1, largest=False)
        task = places[:, 0]
        margin = best[:, 1] - best[:, 0] if len(self.stored) > 1 else torch.full((len(scores),), torch.inf)
        probability = sure.gather(1, task[:, None])[:, 0]
        embedding = torch.softmax(scores.double() / -(SOFTNESS * self.recipe.temperature), 1)
        several = torch.softmax(best.double() / -(HEDGE * self.recipe.temperature), 1)
        alone = torch.eye(1, several.shape[1], dtype=several.dtype)
        chosen = torch.where(probability[:, None] < UNSURE, several, alone)
        shares = torch.zeros_like(sure).scatter_(1, places, chosen)
        return Decisions(task, probability, margin, surprise > threshold, embedding, shares, surprise)
