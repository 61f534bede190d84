"""``retex fit-offsets --refine``: offsets that are trained on a task's unlabelled inputs before they are coded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from retex_cli.commands.expert_models import ExpertModels, read_inputs
from retex_cli.commands.offsets_file import layout_of
from retex_cli.commands.task_fit import TaskFit, Wish
from retex_cli.commands.weigher import norm_layers
from retex_cli.errors import UsageError
from retex_cli.io.checkpoint import Checkpoint
from retex_cli.io.digests import sha256_path
from retex_cli.io.inputs import Example
from retex_cli.models.batchnorm import measure_batchnorm
from retex_cli.models.distil import Schedule, answer_loss, answer_of, distil, mixed
from retex_cli.models.network import Network
from retex_cli.models.processor import Inputs
from retex_cli.models.student import Factors, Student
from retex_cli.offsets.batchnorm import Norm, folded, weights
from retex_cli.offsets.domain import from_domain, to_domain
from retex_cli.offsets.fit import BudgetTooSmall, OffsetFitter
from retex_cli.offsets.predict import Predictor
from retex_cli.offsets.stream import decode
from retex_cli.offsets.trainable import Trainable
from retex_cli.progress import Progress, Silent

SAMPLES = 256
"""Unlabelled inputs of a task that are looked at."""
TEXTS = Schedule(steps=1280, batch_size=8, features=40, rate=0.1, falls=2)
OTHERS = Schedule(steps=480, batch_size=16, rate=0.03)
MEASURED = 0.75
"""How much measured statistics count beside the expert's own: those of a network that is far off are partly errors."""
SHARE = 0.99
"""Of the budget that is used before training, which moves entropies a little."""
BATCH = 64
"""Inputs that BatchNorm's statistics are measured on at a time."""


@dataclass(frozen=True)
class RefineInputs:
    """A task's inputs and the file or folder they are from."""

    path: str
    rows: Sequence[Example]


def refine_inputs(tasks: Sequence[str], inputs: Mapping[str, str], wish: Wish, refine: bool) -> dict[str, RefineInputs]:
    """The first inputs of every task, none where nothing is to be refined.

    UsageError where a task names none and for wishes that this cannot serve, RetexError for too few.
    """
    if not refine:
        return {}
    if wish.target is not None:
        raise UsageError("--refine and --target cannot stand together", "give a budget; retex eval shows the agreement")
    if wish.lossless:
        raise UsageError("--refine and --lossless cannot stand together", "a lossless expert needs no refining")
    return {
        task: RefineInputs(inputs.get(task, ""), read_inputs(task, inputs.get(task), SAMPLES, hold_out=False).measured)
        for task in tasks
    }


def refine_recipe(inputs: Mapping[str, RefineInputs], model: str | None, seed: int) -> dict[str, object]:
    """Which inputs were looked at, by hash, and how; nothing where none were."""
    if not inputs:
        return {}
    hashes = {
        task: {"file": Path(each.path).name, "sha256": sha256_path(Path(each.path)), "inputs": len(each.rows)}
        for task, each in inputs.items()
    }
    return {"refine": {"inputs": hashes, "model": model, "seed": seed}}


@dataclass(frozen=True)
class Refiner:
    """Re-estimates BatchNorm and distils each expert into the offsets that a fitter keeps, within its budget;
    ``without`` some of it: see ``fit_parts``."""

    models: ExpertModels
    inputs: Mapping[str, RefineInputs]
    merged: Checkpoint
    seed: int
    threads: int
    without: frozenset[str]

    @classmethod
    def of(
        cls, models: ExpertModels, inputs: Mapping[str, RefineInputs], merged: Checkpoint, seed: int, threads: int,
        without: frozenset[str] = frozenset(),
    ) -> Refiner | None:  # fmt: skip
        """The refiner of these experts; None where there are no inputs to look at."""
        if not inputs:
            return None
        return cls(models, inputs, merged, seed, threads, without)

    def work(self, task: str) -> int:
        """Steps of a task's training."""
        return 0 if "training" in self.without else self._schedule(task).steps

    def _schedule(self, task: str) -> Schedule:
        return TEXTS if self.inputs[task].rows[0].text is not None else OTHERS

    def distance(self, fit: TaskFit, fitter: OffsetFitter) -> float:
        """How far answers are from the expert's with what a fitter keeps untrained. Holds two networks."""
        teacher, network = self._networks(fit)
        self._settle_batchnorm(fit, fitter, network, self.inputs[fit.task].rows)
        return self._distance(fit, network, fitter.finish(), self._asked(fit, teacher))

    def refine(self, fit: TaskFit, fitter: OffsetFitter, progress: Progress) -> bytes:
        """The coded offsets of one task. Holds two networks. Raises ``BudgetTooSmall``."""
        rows = self.inputs[fit.task].rows
        teacher, network = self._networks(fit)
        try:
            self._settle_batchnorm(fit, fitter, network, rows)
            if "training" in self.without:
                return fitter.finish()
            fitter.budget, budget = int(SHARE * fitter.budget), fitter.budget
            try:
                kept = fitter.components()
            finally:
                fitter.budget = budget
        except BudgetTooSmall:
            return fitter.finish()  # one component: nothing to train
        trainable, schedule = Trainable(kept, fitter.pivots), self._schedule(fit.task)
        schedule = schedule.finer(fitter.left_out(kept, weights(layout_of(self.merged))))
        self.models.load_merged(network, fit.task, self._merged(fit))
        student = Student(network.module)
        names = {name: network.own_name(fit.alignment.shared[name]) for name in trainable.names}
        learner = _Learner(trainable, names, student)
        distil(
            teacher, network, student, learner, rows, schedule,
            seed=self.seed, threads=self.threads, progress=progress,
        )  # fmt: skip
        found = {"refined": fitter.encode_within(trainable.kept()), "as fitted": fitter.finish()}
        return self._best(fit, teacher, {**found, "merged": fitter.encode({})}, progress)

    def _networks(self, fit: TaskFit) -> tuple[Network, Network]:
        """The expert's, and one to be filled."""
        teacher, network = self.models.network(fit.task), self.models.network(fit.task)
        self.models.load_expert(teacher, fit.task)
        return teacher, network

    def _best(self, fit: TaskFit, teacher: Network, found: Mapping[str, bytes], progress: Progress) -> bytes:
        """The offsets whose answers to the inputs are nearest to the expert's: never worse than none at all."""
        network = self.models.network(fit.task)
        asked = self._asked(fit, teacher)
        distances = {name: self._distance(fit, network, data, asked) for name, data in found.items()}
        best = min(distances, key=lambda name: distances[name])
        told = ", ".join(f"{name} {distance:.4f}" for name, distance in distances.items())
        if best != next(iter(found)):
            progress.note(f"{fit.task}: training did not help, so its offsets are kept {best}")
        progress.note(f"{fit.task}: distance of answers from the expert's on its inputs: {told}")
        return found[best]

    def _asked(self, fit: TaskFit, teacher: Network) -> tuple[list[Inputs], Tensor]:
        """A task's inputs and the expert's answers to them; images are blended, as in training: of the few that there
        are the expert is so sure that its answers hardly move."""
        draw = torch.Generator().manual_seed(self.seed)
        batches = [mixed(inputs, draw) for inputs in _batches(teacher, self.inputs[fit.task].rows)]
        return batches, _answers(teacher, batches)

    def _distance(self, fit: TaskFit, network: Network, data: bytes, asked: tuple[list[Inputs], Tensor]) -> float:
        """Of answers with coded offsets from the expert's."""
        batches, wanted = asked
        self.models.load_merged(network, fit.task, self._recovered(fit, data))
        return float(answer_loss(_answers(network, batches), wanted))

    def _settle_batchnorm(self, fit: TaskFit, fitter: OffsetFitter, network: Network, rows: Sequence[Example]) -> None:
        """Measure the recovered network's running statistics and have the fitter aim at a layer that uses them."""
        own = norm_layers(network, fit.alignment, layout_of(self.merged))
        if not own or "statistics" in self.without:
            return
        theirs = fit.alignment.shared
        names = {name: network.own_name(file) for name, file in theirs.items()}
        expert = {name: fit.expert.read(theirs[name]).float() for norm in own for name in norm.names}
        self._aim(fitter, expert, {norm: layer.eps for norm, layer in own.items()})
        recovered = self._recovered(fit, fitter.finish()) | expert
        self.models.load_merged(network, fit.task, recovered)
        measured = measure_batchnorm(network, list(_batches(network, rows)), Silent())
        for norm in own:
            expert[norm.mean] = expert[norm.mean].lerp(measured[names[norm.mean]], MEASURED)
            variances = (expert[norm.variance], measured[names[norm.variance]])
            theirs_log, log = (to_domain(norm.variance, value) for value in variances)
            expert[norm.variance] = from_domain(norm.variance, theirs_log.lerp(log, MEASURED))
        self._aim(fitter, expert, {norm: layer.eps for norm, layer in own.items()})

    def _aim(self, fitter: OffsetFitter, wanted: Mapping[str, Tensor], epsilons: Mapping[Norm, float]) -> None:
        for norm, epsilon in epsilons.items():
            aim = folded(norm, wanted.__getitem__, self.merged.read, epsilon)
            for name, value in aim.values.items():
                delta = to_domain(name, value) - to_domain(name, self.merged.read(name))
                fitter.update(name, fitter.prepare(delta), aim.pivots.get(name))

    def _merged(self, fit: TaskFit) -> dict[str, Tensor]:
        return {name: self.merged.read(name) for name in fit.alignment.shared}

    def _recovered(self, fit: TaskFit, data: bytes) -> dict[str, Tensor]:
        predictor = Predictor({fit.task: decode(data, layout_of(self.merged))})
        return {
            name: predictor.add_to(name, tensor, {fit.task: 1.0}, torch.device("cpu"))
            for name, tensor in self._merged(fit).items()
        }


def _batches(network: Network, rows: Sequence[Example]) -> Iterator[Inputs]:
    """A last batch under half the size is left out: its variances are poor."""
    for start in range(0, len(rows), BATCH):
        if start == 0 or len(rows) - start > BATCH // 2:
            yield network.inputs(rows[start : start + BATCH])


def _answers(network: Network, batches: Sequence[Inputs]) -> Tensor:
    """Of all inputs, on the CPU."""
    with network.inference():
        return torch.cat([answer_of(network.module(**inputs)).float().cpu() for inputs in batches])


class _Learner:
    """Trained components as tensors of a network that was filled with the merged weights.

    ``names``: what the network calls them.
    """

    def __init__(self, trainable: Trainable, names: Mapping[str, str], student: Student) -> None:
        self._trainable, self._names, self._student = trainable, names, student
        self._own = {name: student.own(theirs).detach() for name, theirs in self._names.items()}

    @property
    def parameters(self) -> list[Tensor]:
        return self._trainable.parameters

    def settle(self) -> None:
        self._trainable.settle()

    def values(self) -> dict[str, Tensor | Factors]:
        return {theirs: self._value(name, theirs) for name, theirs in self._names.items()}

    def _value(self, name: str, theirs: str) -> Tensor | Factors:
        left, right = self._trainable.factors(name)
        own = self._own[name]
        extra = (own.shape[0] if own.ndim else 1) - len(left)
        if extra:  # rows of the expert alone, which have no offset
            left = functional.pad(left, (0, 0, 0, extra))
        if right is not None and self._student.adds(theirs):
            return left, right
        delta = left if right is None else left @ right
        return from_domain(name, to_domain(name, own) + delta.view(own.shape))
