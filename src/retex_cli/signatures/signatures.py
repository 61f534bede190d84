"""Fitted signatures: scores, decisions with calibrated probabilities, and the arrays that a file holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from retex_cli.errors import RetexError
from retex_cli.signatures import gaussian
from retex_cli.signatures.features import Layout, check, check_layout, vectors
from retex_cli.signatures.scatter import Scatter, pooled_variance

GAUSSIAN, RESIDUAL = "gaussian", "residual"
"""Scores: the regularised discriminant of ``gaussian``, or the norm outside a task's subspace (arXiv 2606.22589)."""


@dataclass(frozen=True)
class Recipe:
    """All choices that were made, and what they achieved on left-out reference inputs.

    ``shrinkage`` and ``own`` belong to the gaussian score, see ``gaussian``. ``temperature`` turns scores into
    probabilities. An input whose nearest task it fits worse than ``threshold`` standard deviations, measured by the
    score among the task's own left-out inputs (``centre``, ``spread`` per task), is unknown; ``false_alarms`` is the
    share of left-out inputs that would be. ``recognised`` is the share of each task's left-out inputs that were named
    right.
    """

    preset: str
    score: str
    layers: tuple[int, ...]
    weights: tuple[float, ...]
    layer_count: int
    width: int
    shrinkage: float
    own: float
    temperature: float
    threshold: float
    false_alarms: float
    centre: Mapping[str, float]
    spread: Mapping[str, float]
    recognised: Mapping[str, float]
    counts: Mapping[str, int]

    @property
    def layout(self) -> Layout:
        """Which layers make a vector, and with which weights."""
        return Layout(self.layers, self.weights, self.layer_count, self.width)


@dataclass(frozen=True)
class Decisions:
    """One entry per input. ``task`` int64 index; ``probability`` of that task; ``margin`` to the second best in units
    of the score; ``unknown`` bool; ``embedding`` [m, T] rows that sum to one: softmax of minus score over temperature.
    """

    task: Tensor
    probability: Tensor
    margin: Tensor
    unknown: Tensor
    embedding: Tensor


class Signatures:
    """Statistics of every task, sorted by name, and the recipe that says how to use them."""

    def __init__(self, recipe: Recipe, scatters: Mapping[str, Scatter]) -> None:
        self.recipe = recipe
        self._scatters = {task: scatters[task] for task in sorted(scatters)}

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names, in the order of all indices."""
        return tuple(self._scatters)

    @property
    def recognised(self) -> Mapping[str, float]:
        """Share of each task's left-out reference inputs that were named right."""
        return self.recipe.recognised

    def describe(self) -> dict[str, object]:
        """The choices, in a few words."""
        chosen: dict[str, object] = {"score": self.recipe.score, "layers": list(self.recipe.layers)}
        if self.recipe.score == GAUSSIAN:
            chosen |= {"shrinkage": self.recipe.shrinkage, "own": self.recipe.own}
        return chosen

    def score(self, features: Tensor) -> Tensor:
        """Float32 [m, T], smaller is closer, of ``features`` [m, layers, width]. RetexError for another encoder's."""
        check(features, "the inputs")
        check_layout(features, self.recipe.layout, "the inputs")
        rows = vectors(features, self.recipe.layout)
        if self.recipe.score == RESIDUAL:
            return torch.stack([residual_norm(rows, part.mean, part.basis) for part in self._scatters.values()], 1)
        return gaussian.distances(self._whitened, (rows.double() @ self._whitened.map)).float()

    @cached_property
    def _whitened(self) -> gaussian.Whitened:
        parts = list(self._scatters.values())
        counts = [part.count for part in parts]
        factors = [part.factor.double() * part.count**0.5 for part in parts]
        weights = gaussian.weights(counts, pooled_variance(parts), self.recipe.shrinkage, self.recipe.own)
        return gaussian.whiten(torch.stack([part.mean.double() for part in parts]), factors, weights)

    def identify(self, features: Tensor) -> Decisions:
        """Each of the inputs ``features`` [m, layers, width] by itself."""
        return self._decide(self.score(features))

    def identify_batch(self, features: Tensor) -> Decisions:
        """All inputs together, which share a task: one entry, decided by the mean score."""
        return self._decide(self.score(features).mean(0, keepdim=True), len(features))

    def _decide(self, scores: Tensor, inputs: int = 1) -> Decisions:
        embedding = torch.softmax(-scores.double() * inputs / self.recipe.temperature, 1)
        task = scores.argmin(1)
        best = scores.sort(1).values
        margin = best[:, 1] - best[:, 0] if len(self.tasks) > 1 else torch.full((len(scores),), float("inf"))
        centre = torch.tensor([self.recipe.centre[name] for name in self.tasks])
        spread = torch.tensor([self.recipe.spread[name] for name in self.tasks])
        strangeness = (best[:, 0] - centre[task]) / spread[task] * inputs**0.5
        return Decisions(
            task=task,
            probability=embedding.gather(1, task[:, None])[:, 0],
            margin=margin,
            unknown=strangeness > self.recipe.threshold,
            embedding=embedding,
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """Arrays for a file: per task ``mean`` float32, ``basis`` int8 with ``scales``, ``spectrum``, ``residual``."""
        tensors: dict[str, Tensor] = {}
        for task, part in self._scatters.items():
            scales = part.basis.abs().amax(1).clamp_min(1e-30) / 127
            tensors[f"{task}/mean"] = part.mean.float()
            tensors[f"{task}/basis"] = torch.round(part.basis / scales[:, None]).to(torch.int8)
            tensors[f"{task}/scales"] = scales.float()
            tensors[f"{task}/spectrum"] = part.spectrum.float()
            tensors[f"{task}/residual"] = torch.tensor([part.residual], dtype=torch.float32)
        return tensors

    def to_metadata(self) -> dict[str, object]:
        """The recipe as a JSON object."""
        return asdict(self.recipe)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, object]) -> Self:
        """What ``to_tensors`` and ``to_metadata`` gave. RetexError where they do not fit together."""
        try:
            fields = dict(metadata)
            fields["layers"], fields["weights"] = tuple(fields["layers"]), tuple(fields["weights"])  # type: ignore[arg-type]
            recipe = Recipe(**fields)  # type: ignore[arg-type]
            scatters = {
                task: Scatter(
                    count=count,
                    mean=tensors[f"{task}/mean"],
                    basis=tensors[f"{task}/basis"].float() * tensors[f"{task}/scales"][:, None],
                    spectrum=tensors[f"{task}/spectrum"],
                    residual=float(tensors[f"{task}/residual"]),
                )
                for task, count in recipe.counts.items()
            }
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise RetexError(f"the signatures are damaged: {error}", "build them again") from error
        return cls(recipe, scatters)

    def with_recipe(self, **changes: object) -> Signatures:
        """The same statistics under a changed recipe."""
        return Signatures(replace(self.recipe, **changes), self._scatters)  # type: ignore[arg-type]


def residual_norm(rows: Tensor, mean: Tensor, basis: Tensor) -> Tensor:
    """``|| (I - V V^T)(f - mu) ||`` [m] of ``rows`` [m, D] for a task's mean [D], basis [r, D] (arXiv 2606.22589)."""
    away = rows - mean.to(rows.dtype)
    basis = basis.to(rows.dtype)
    outside = away - (away @ basis.T) @ basis
    return outside.square().sum(1).sqrt()
