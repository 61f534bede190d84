"""``alpha = auto``: the scale at which the merged network does best, on held-out inputs or on labelled data.

Every method that takes ``alpha`` is affine in it, so two merges, at 0 and at 1, give the merge at any scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from retex_cli.commands.expert_models import ExpertModels, TaskInputs
from retex_cli.errors import RetexError, UsageError
from retex_cli.merging.engine import Copy, Merge
from retex_cli.merging.memory import merge_steps
from retex_cli.merging.table import AUTO, VALIDATION, Method
from retex_cli.models.classifier import classify
from retex_cli.models.network import Network
from retex_cli.progress import Progress, Silent

GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 1.75, 2.0)
"""Scales that are tried first; then the two half way to the neighbours of the best."""

BEYOND, LARGEST = 1.5, 20.0
"""Where the largest scale is the best so far, one larger by this factor is tried, up to there: methods with a flat
spectrum (Iso-C) make task vectors that are far shorter than the sum of the experts'."""

Adjust = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""What of merged weights is replaced before they are used: BatchNorm's statistics, or nothing."""

Score = tuple[float, float]
"""Share of right (or agreeing) answers, and mean log-likelihood of those answers, which breaks ties."""


@dataclass(frozen=True)
class Scale:
    """The chosen ``alpha`` and how it was chosen. ``tried``: alpha -> mean share over tasks of right answers."""

    alpha: float
    by: str
    tried: Mapping[float, float]

    def to_json(self) -> dict[str, object]:
        """``{"alpha", "by", "tried": {alpha: share}}``, for the recipe."""
        return {"alpha": self.alpha, "by": self.by, "tried": {f"{a:g}": s for a, s in sorted(self.tried.items())}}

    def sentence(self) -> str:
        """For people."""
        best, usual = self.tried[self.alpha], self.tried[1.0]
        return f"alpha = {self.alpha:g}, chosen by {self.by}: {100 * best:.2f} % (at 1: {100 * usual:.2f} %)"


def wanted_scale(method: Method, options: Mapping[str, object], overrides: Mapping[str, Mapping[str, object]]) -> str:
    """ "auto", "validation", or "" where every scale is given. UsageError for what cannot be chosen."""
    for glob, given in overrides.items():
        if given.get("alpha") in (AUTO, VALIDATION):
            raise UsageError(
                f"alpha = {given['alpha']} for {glob!r} alone cannot be chosen", "give a number there, or auto for all"
            )
    word = options.get("alpha")
    if word not in (AUTO, VALIDATION):
        return ""
    if options.get("lines") is not None and options.get("lines_alpha", AUTO) == AUTO:
        raise UsageError(
            f"alpha = {word} together with the lines_alpha of the paper: both set the same scale", "give lines_alpha"
        )
    return str(word)


def at_scale(steps: Iterable[Merge | Copy], alpha: float) -> list[Merge | Copy]:
    """The steps with ``alpha`` wherever one is to be chosen."""
    return [
        replace(step, options={**step.options, "alpha": alpha})
        if isinstance(step, Merge) and step.options.get("alpha") in (AUTO, VALIDATION)
        else step
        for step in steps
    ]


@dataclass
class _Search:
    """Both ends in memory, and the scores so far."""

    word: str
    models: ExpertModels
    inputs: Mapping[str, TaskInputs]
    zero: Mapping[str, Tensor]
    one: Mapping[str, Tensor]
    adjust: Adjust
    batch_size: int
    threads: int
    progress: Progress
    adjusted: dict[float, Mapping[str, Tensor]] = field(default_factory=dict)

    def scores(self, alphas: Sequence[float]) -> dict[float, Score]:
        """Mean over tasks, for every alpha. One network is built per task."""
        self.progress.start(f"alpha {min(alphas):g} to {max(alphas):g}", len(alphas) * len(self.models.experts))
        per_task = []
        for task in self.models.experts:
            network = self.models.network(task)
            per_task.append(self._task_scores(network, task, alphas))
        count = len(per_task)
        return {
            alpha: (sum(s[k][0] for s in per_task) / count, sum(s[k][1] for s in per_task) / count)
            for k, alpha in enumerate(alphas)
        }

    def _task_scores(self, network: Network, task: str, alphas: Sequence[float]) -> list[Score]:
        given = self.inputs[task]
        rows = given.held_out if self.word == AUTO else given.validation
        self.models.load_expert(network, task)
        expert = classify(network, rows, self.batch_size, self.threads, Silent())
        if self.word == AUTO:
            target, best = expert.argmax(1), 1.0
        else:
            target = torch.tensor([_place(network.labels, row.label, row.source) for row in rows])
            best = max((expert.argmax(1) == target).float().mean().item(), 1 / len(rows))
        found = []
        for alpha in alphas:
            merged = {n: torch.lerp(zero, self.one[n], alpha) for n, zero in self.zero.items()}
            if alpha not in self.adjusted:  # every task's network gets the same
                self.adjusted[alpha] = self.adjust(merged)
            merged |= self.adjusted[alpha]
            self.models.load_merged(network, task, merged)
            logits = classify(network, rows, self.batch_size, self.threads, Silent())
            share = (logits.argmax(1) == target).float().mean().item() / best
            found.append((share, logits.log_softmax(1).gather(1, target[:, None]).mean().item()))
            self.progress.advance()
        return found


def _place(labels: Sequence[str], label: str | None, source: str) -> int:
    if label not in labels:
        raise RetexError(f"{source}: label {label!r} is not one of the expert's", "use the label names of config.json")
    return labels.index(label)


def choose_scale(
    word: str,
    method: Method,
    steps: Sequence[Merge | Copy],
    models: ExpertModels,
    inputs: Mapping[str, TaskInputs],
    adjust: Adjust,
    *,
    batch_size: int,
    threads: int,
    budget: int,
    progress: Progress,
) -> Scale:
    """Merge at 0 and at 1, try the scales between and beyond, and take the best."""
    progress.start("merging at alpha 0 and 1", 2)
    zero = merge_steps(method, at_scale(steps, 0.0), threads=threads, budget=budget)
    progress.advance()
    one = merge_steps(method, at_scale(steps, 1.0), threads=threads, budget=budget)
    progress.advance()
    search = _Search(word, models, inputs, zero, one, adjust, batch_size, threads, progress)
    scores = search.scores(GRID)
    while _best(scores) == max(scores) < LARGEST:
        scores |= search.scores([round(max(scores) * BEYOND, 4)])
    tried = [0.0, *sorted(scores)]
    place = tried.index(_best(scores))
    scores |= search.scores([round((tried[place] + other) / 2, 4) for other in tried[place - 1 : place + 2 : 2]])
    sizes = {len(given.held_out if word == AUTO else given.validation) for given in inputs.values()}
    count = f"{min(sizes)} to {max(sizes)}" if len(sizes) > 1 else str(max(sizes))
    by = (
        f"agreement with the experts on {count} held-out inputs a task"
        if word == AUTO
        else f"share of the experts' accuracy on {count} labelled validation rows a task"
    )
    return Scale(_best(scores), by, {alpha: share for alpha, (share, _) in scores.items()})


def _best(scores: Mapping[float, Score]) -> float:
    return max(scores, key=lambda alpha: (*scores[alpha], -alpha))
