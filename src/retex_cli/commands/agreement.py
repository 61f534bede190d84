"""How far a recovered expert answers as the expert itself does, on held-out inputs and without any label."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from retex_cli.commands.expert_models import ExpertModels, read_inputs
from retex_cli.commands.offsets_file import layout_of
from retex_cli.commands.task_fit import LARGEST, TaskFit
from retex_cli.errors import RetexError
from retex_cli.io.checkpoint import Checkpoint
from retex_cli.io.digests import sha256_path
from retex_cli.io.inputs import Example
from retex_cli.models.classifier import classify
from retex_cli.offsets.fit import OffsetFitter
from retex_cli.offsets.predict import Predictor
from retex_cli.offsets.shares import Found, smallest
from retex_cli.offsets.stream import decode
from retex_cli.progress import Silent


@dataclass(frozen=True)
class Held:
    """A task's held-out inputs and the file or folder they are from."""

    path: str
    rows: Sequence[Example]


@dataclass(frozen=True)
class Agreement:
    """On which share of so many held-out ``inputs`` a recovered expert gives the expert's own answer."""

    share: float
    inputs: int

    def to_json(self) -> dict[str, object]:
        """``{"share", "inputs", "resolution"}``; the resolution is what one input changes."""
        return {"share": self.share, "inputs": self.inputs, "resolution": 1 / self.inputs}

    @classmethod
    def from_json(cls, value: object) -> Agreement:
        """The inverse."""
        assert isinstance(value, Mapping)
        return cls(float(value["share"]), int(value["inputs"]))

    def __str__(self) -> str:
        return f"{100 * self.share:.2f} % of {self.inputs}"


def held_out_inputs(tasks: Sequence[str], inputs: Mapping[str, str]) -> dict[str, Held]:
    """The last quarter of every task's inputs. UsageError where a task names none, RetexError for too few."""
    return {
        task: Held(inputs.get(task, ""), read_inputs(task, inputs.get(task), 0, hold_out=True).held_out)
        for task in tasks
    }


def inputs_recipe(held: Mapping[str, Held], model: str | None) -> dict[str, object]:
    """Which inputs decide on a budget, by hash; nothing where none do."""
    if not held:
        return {}
    hashes = {
        task: {"file": Path(each.path).name, "sha256": sha256_path(Path(each.path))} for task, each in held.items()
    }
    return {"inputs": hashes, "model": model}


@dataclass(frozen=True)
class Judge:
    """Compares answers. ``target`` is the share of held-out inputs on which they have to be the same."""

    target: float
    models: ExpertModels
    inputs: Mapping[str, Held]
    merged: Checkpoint
    batch_size: int
    threads: int

    @classmethod
    def of(
        cls, target: float | None, models: ExpertModels, held: Mapping[str, Held], merged: Checkpoint,
        batch_size: int, threads: int,
    ) -> Judge | None:  # fmt: skip
        """The judge of these experts; None where no target is to be reached."""
        if target is None:
            return None
        return cls(target, models, held, merged, batch_size, threads)

    def scorer(self, fit: TaskFit) -> Callable[[bytes], float]:
        """A function from a task's coded offsets to the share of its inputs that get the expert's answer.

        Holds one network and one set of weights. RetexError where the expert has no config to build a network from.
        """
        rows, layout = self.inputs[fit.task].rows, layout_of(self.merged)
        network = self.models.network(fit.task)
        self.models.load_expert(network, fit.task)
        expected = classify(network, rows, self.batch_size, self.threads, Silent()).argmax(1)

        def score(data: bytes) -> float:
            predictor = Predictor({fit.task: decode(data, layout)})
            recovered = {}
            for name, theirs in fit.alignment.shared.items():
                value = predictor.add_to(name, self.merged.read(name), {fit.task: 1.0}, torch.device("cpu"))
                recovered[name] = value.to(fit.expert.tensors[theirs].dtype)
            self.models.load_merged(network, fit.task, recovered)
            answers = classify(network, rows, self.batch_size, self.threads, Silent()).argmax(1)
            return float((answers == expected).double().mean())

        return score


def reach(fit: TaskFit, fitter: OffsetFitter, judge: Judge) -> Found:
    """The smallest offsets that agree with the expert as often as the judge asks.

    RetexError, with what the largest budget achieves, where none does.
    """

    def code(budget: int) -> bytes:
        fitter.budget = budget
        return fitter.finish()

    found = smallest(code, judge.scorer(fit), judge.target, fitter.least(), fit.budget)
    if found.score < judge.target:
        achieved = Agreement(found.score, len(judge.inputs[fit.task].rows))
        raise RetexError(
            f"task {fit.task!r}: even {found.budget:,} bytes, {LARGEST} of the expert, agree with it on {achieved} "
            f"held-out inputs, not on {100 * judge.target:g} %",
            "lower --target, or use --lossless",
        )
    return found
