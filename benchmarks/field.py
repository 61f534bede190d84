"""A suite as a field to compete on: its tensors for those who compress, its test rows for what they bring back."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rivals.form import Case, Known, Tensors

from retex_cli.commands.expert_models import ExpertModels, read_inputs
from retex_cli.io.align import align
from retex_cli.io.checkpoint import Checkpoint, open_checkpoint, open_expert
from retex_cli.io.inputs import Example, read_rows
from retex_cli.io.provenance import checkpoint_digests
from retex_cli.models.classifier import classify
from retex_cli.models.device import choose_device
from retex_cli.models.network import Network
from retex_cli.models.statistics import gram_layers, input_grams
from retex_cli.offsets.domain import from_domain, to_domain
from retex_cli.parallel import thread_count
from retex_cli.progress import Silent
from retex_cli.workspace import Workspace

SAMPLES = 32
"""Unlabelled inputs of a task for rivals that measure: ESM++'s number."""

DRAWS = 2000
"""Bootstrap samples of the test rows."""

Answers = NDArray[np.int64]


class Field:
    """The experts of a suite, one merged checkpoint of theirs, and the test rows of every task, at most ``rows``.

    Tensors are handed out as retex's own offsets see them, float32 and BatchNorm's variances as logarithms, so that no
    rival loses a network to a negative variance.
    """

    def __init__(self, folder: Path, merged: Path, rows: int | None = None) -> None:
        space = Workspace.load(folder)
        if space.model and str(folder.resolve()) not in sys.path:
            sys.path.insert(0, str(folder.resolve()))  # where the module lies that builds a network of its own
        base = open_checkpoint(space.need_base(None))
        references = space.with_experts({})
        experts = {task: open_expert(reference, base) for task, reference in references.items()}
        alignments = {task: align(base, expert) for task, expert in experts.items()}
        self.models = ExpertModels(experts, alignments, choose_device("auto", Silent()), space.model)
        self.base, self.merged = base, open_checkpoint(merged)
        self.names = [
            name
            for name, info in self.merged.tensors.items()
            if info.dtype.is_floating_point and all(name in alignment.shared for alignment in alignments.values())
        ]
        self.tasks = tuple(experts)
        self.inputs = space.with_inputs({})
        self.tests = {task: drawn(read_rows(path), rows) for task, path in space.with_tests({}).items()}
        self.expert_bytes = 4 * sum(self.merged.tensors[name].numel for name in self.names)
        self._truths: dict[str, Answers] = {}
        self.own = {task: self._answers(task, None) for task in self.tasks}

    def tensors(self, checkpoint: Checkpoint, task: str | None = None) -> dict[str, torch.Tensor]:
        """The shared tensors of the base, the merged checkpoint or, with ``task``, of an expert."""
        theirs = self.models.alignments[task].shared if task else {name: name for name in self.names}
        found = {}
        for name in self.names:
            tensor = checkpoint.read(theirs[name])
            if tensor.ndim:  # a grown vocabulary has rows of the task's own
                tensor = tensor[: self.merged.tensors[name].shape[0]]
            found[name] = to_domain(name, tensor).contiguous()
        return found

    def fingerprint(self) -> str:
        """Of the experts' folders, which are named by their recipes, their answers, and the merged tensors."""
        state = hashlib.sha256()
        for task, expert in self.models.experts.items():
            state.update(f"{task} {Path(expert.reference).resolve().name}\n".encode())
            state.update(self._truths[task].tobytes() + self.own[task].tobytes())
        for name, found in sorted(checkpoint_digests(self.merged, 1).items()):
            state.update(name.encode() + found)
        return state.hexdigest()

    def case(self) -> Case:
        """What the rivals compress."""
        experts = {task: self.tensors(self.models.experts[task], task) for task in self.tasks}
        known = Known(self.tensors(self.merged), self.tensors(self.base))
        return Case(known, experts, cache(self._grams))

    def _grams(self) -> dict[str, dict[str, torch.Tensor]]:
        return {task: dict(self._grams_of(task)) for task in self.tasks}

    def _grams_of(self, task: str) -> Iterator[tuple[str, torch.Tensor]]:
        ours = {theirs: name for name, theirs in self.models.alignments[task].shared.items() if name in self.names}
        examples = read_inputs(task, self.inputs[task], SAMPLES, hold_out=False).measured
        network = self.models.network(task)
        self.models.load_expert(network, task)
        names = ours.keys() & gram_layers(network.module).keys()
        for name, gram in input_grams(network, examples, names, 32, thread_count(None), Silent()):
            yield ours[name], gram

    def scores(self, recovered: Callable[[str], Tensors]) -> dict[str, object]:
        """Shares of the experts' own accuracy on the same rows, and of answers that are the expert's.

        ``recovered``: task -> its shared tensors, as ``tensors`` gives them. ``interval`` and ``worst_interval`` hold
        95 of 100 bootstrap samples of every task's test rows.
        """
        answers = {task: self._answers(task, recovered(task)) for task in self.tasks}
        shares = {task: self._share(task, found) for task, found in answers.items()}
        worst = min(shares, key=lambda task: shares[task])
        draws = {task: self._draws(task, found) for task, found in answers.items()}
        return {
            "mean": _mean(shares.values()),
            "worst": shares[worst],
            "tasks": shares,
            "agreement": _mean(float((found == self.own[task]).mean()) for task, found in answers.items()),
            "interval": _interval(np.stack(list(draws.values())).mean(0)),
            "worst_interval": _interval(draws[worst]),
        }

    def _share(self, task: str, answers: Answers) -> float:
        truth = self._truths[task]
        return float((answers == truth).mean() / (self.own[task] == truth).mean())

    def _draws(self, task: str, answers: Answers) -> NDArray[np.float64]:
        """``_share`` on bootstrap samples, expert and recovered on the same rows: only four kinds of rows count."""
        truth = self._truths[task]
        kinds = np.bincount(2 * (self.own[task] == truth) + (answers == truth), minlength=4)
        drawn = np.random.default_rng(0).multinomial(kinds.sum(), kinds / kinds.sum(), DRAWS)
        return (drawn[:, 1] + drawn[:, 3]) / np.maximum(drawn[:, 2] + drawn[:, 3], 1)

    def _answers(self, task: str, recovered: Tensors | None) -> Answers:
        network = self.models.network(task)
        if recovered is None:
            self.models.load_expert(network, task)
            self._truths[task] = self._truth(network, task)
        else:
            kinds = self.merged.tensors
            weights = {name: from_domain(name, value).to(kinds[name].dtype) for name, value in recovered.items()}
            self.models.load_merged(network, task, weights)
        logits = classify(network, self.tests[task], 64, thread_count(None), Silent())
        return logits.argmax(1).numpy()

    def _truth(self, network: Network, task: str) -> Answers:
        numbers = {label: number for number, label in enumerate(network.labels)}
        return np.array([numbers.get(str(row.label), -1) for row in self.tests[task]])


def drawn(rows: Sequence[Example], count: int | None) -> Sequence[Example]:
    """At most ``count`` rows, always the same ones, from all over a file: test files may be sorted by their labels."""
    if count is None or count >= len(rows):
        return rows
    return [rows[k] for k in sorted(random.Random(0).sample(range(len(rows)), count))]


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _interval(draws: NDArray[np.float64]) -> list[float]:
    return [float(edge) for edge in np.quantile(draws, (0.025, 0.975))]
