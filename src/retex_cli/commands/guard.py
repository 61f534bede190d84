"""The two promises of an offsets file, kept by looking at what the recovered network answers.

A bigger file is never worse than a smaller one, and none is worse than the merged checkpoint: the energy of weights
alone cannot promise that. So the answers to some inputs are compared with the expert's own: to those of the task where
a fit reads them anyway, else to inputs that are made without data. A fit that answers worse than a smaller one or than
merged weights gives way to it. In a network that normalises nothing, where an error in one layer grows through
all that follow, the budget is shared out by the effect on answers, too, and the better of both is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from torch import Tensor

from retex_cli.commands.offsets_file import layout_of
from retex_cli.commands.task_fit import TaskFit
from retex_cli.commands.weigher import Weigher, halfway
from retex_cli.errors import RetexError
from retex_cli.io.checkpoint import Checkpoint
from retex_cli.io.inputs import Example
from retex_cli.models.batchnorm import batchnorm_layers
from retex_cli.models.compare import apart, diverged, thinned
from retex_cli.models.distil import answer_of
from retex_cli.models.effects import effects
from retex_cli.models.network import normalises
from retex_cli.models.passes import run
from retex_cli.models.probes import flat, probes
from retex_cli.models.processor import Inputs
from retex_cli.offsets.fit import BudgetTooSmall, OffsetFitter
from retex_cli.offsets.predict import Predictor
from retex_cli.offsets.stream import Shape, decode
from retex_cli.progress import Progress, Silent

LADDER = (1e-4, 2e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2)
"""Budgets that a fit is measured against, as shares of the fp32 bytes of the tensors that have offsets."""
SMALLER = 0.75
"""A rung is a smaller budget up to this share of one."""
CLEAR = 2.0
"""Standard errors of the mean, over inputs, from which on one fit is clearly worse than another."""
UNSURE = 1.5
"""What looks that much better with fewer offsets on inputs made without data need not be so on the task's own."""
SURE = 3.0
"""How many times nearer is believed of inputs made without data, whatever the network: fewer offsets in one that
normalises, any offsets in one that does not, on flat images, too (there a network half way may be the worse for it on
inputs that look otherwise). Inputs that BatchNorm's statistics were matched by are believed as they are."""
UNMATCHED = (
    "no inputs could be made that fit the network's BatchNorm statistics: more offsets may answer worse than fewer"
)
LITTLE = "inputs made without data show large differences alone: more offsets may answer a little worse than fewer"
"""What is said where a larger file may still be worse than a smaller one."""
BATCH = 8
"""Inputs in one pass: few, so that passes stand side by side."""


@dataclass(frozen=True)
class Fit:
    """Coded offsets, the bytes they were fitted to and by how much errors in tensors count there."""

    data: bytes
    budget: int
    weights: Mapping[str, float]


Fresh = Callable[[int, Mapping[str, float]], bytes]
"""Coded offsets within so many bytes, errors weighted so, to the bit as a fit to that budget alone has them. Raises
``BudgetTooSmall``."""
Trimmed = Callable[[int], bytes]
"""Coded offsets within so many bytes from the components that were found for more: nearly what ``Fresh`` gives, and
quickly made."""


@dataclass(frozen=True)
class Choice:
    """What was kept of a fit: ``data``, fitted to ``budget`` bytes (0: none at all), and in the mean over ``inputs``
    (see ``_Tried``) how far answers are from the expert's with it, with the whole first fit and with merged weights
    alone."""

    data: bytes
    budget: int
    inputs: int
    distance: float
    whole: float
    merged: float

    def to_json(self) -> dict[str, object]:
        """``{"budget_bytes", "inputs", "distance", "whole", "merged"}``."""
        far = {"distance": self.distance, "whole": self.whole, "merged": self.merged}
        return {"budget_bytes": self.budget, "inputs": self.inputs, **far}


@dataclass(frozen=True)
class Guard:
    """Chooses what to keep of every fit to ``merged``. ``alone``: the merged weights that no fit may be worse than;
    those of ``merged`` have in them what offsets have in common. ``weigher``: what knows the networks, and the inputs
    that they are asked; ``trained``: whether fits were trained on those; ``without``: see ``fit_parts``."""

    weigher: Weigher
    merged: Checkpoint
    alone: Checkpoint
    trained: bool = False
    without: frozenset[str] = frozenset()
    _refused: list[str] = field(default_factory=list)
    _doubted: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls, fits: Sequence[TaskFit], weigher: Weigher, merged: Checkpoint, progress: Progress,
        without: frozenset[str] = frozenset(), alone: Checkpoint | None = None,
    ) -> Guard | None:  # fmt: skip
        """The guard of these experts; None where nothing is to be compared or what is recovered is exact, and, said in
        a note, where there is no network to run."""
        if "compare" in without or all(fit.lossless for fit in fits):
            return None
        bare = [fit for fit in fits if "config.json" not in fit.expert.side_files()]
        if bare:
            _only_weights(progress, f"{bare[0].expert.reference} has no config.json to build its network from")
            return None
        trained = bool(weigher.inputs) and "training" not in without
        return cls(weigher, merged, alone or merged, trained, without)

    def choose(self, fit: TaskFit, first: Fit, fresh: Fresh, trimmed: Trimmed, progress: Progress) -> Choice | None:
        """The best of ``first``, of smaller fits, which ``fresh`` makes, and none; a note says where less is kept.

        None, said in one note for all tasks, where the network cannot be run. Another note says where this may miss
        something: see ``SURE``.
        """
        if self._refused:
            return None
        try:
            trial = _Trial(self, fit, first.weights, progress)
        except RetexError as error:
            self._refused.append(fit.task)
            _only_weights(progress, error.message)
            return None
        if trial.doubtful and not self._doubted:
            self._doubted.append(fit.task)
            progress.note(f"{trial.doubtful}; --refine compares them on the tasks' inputs")
        found = trial.choose(first, fresh, trimmed)
        if found.budget < first.budget:
            kept = f"those within {found.budget:,} bytes ({found.distance:.3g}) are" if found.budget else "none are"
            other = "fewer" if found.budget else "merged weights alone"
            near = "not surely nearer to" if found.whole < found.distance else "further from"
            progress.note(
                f"{fit.task}: with offsets within {first.budget:,} bytes answers are {near} the expert's "
                f"({found.whole:.3g}) than with {other} ({found.distance:.3g}): {kept} kept"
            )
        return found


def _only_weights(progress: Progress, why: str) -> None:
    progress.note(f"offsets are chosen by weights alone, not by what the networks answer: {why}")


@dataclass(frozen=True)
class _Tried:
    """Coded offsets, the budget they were fitted to, and the distance of each input's answer from the expert's.

    Distances count by their ratios, so that no single input decides; ``summed``, as they are, as in training.
    """

    data: bytes
    budget: int
    distances: Tensor
    summed: bool = False

    @property
    def mean(self) -> float:
        """Geometric, of what is summed arithmetic."""
        mean = float(self._scores.mean())
        return mean if self.summed else math.exp(mean)

    @property
    def _scores(self) -> Tensor:
        return self.distances if self.summed else self.distances.log()

    def on(self, kind: slice) -> _Tried:
        """On these inputs alone."""
        return replace(self, distances=self.distances[kind])

    def worse(self, other: _Tried, factor: float, errors: float) -> bool:
        """Whether answers are more than ``factor`` times as far away, beyond so many standard ``errors``; of what is
        summed, whether they are further by more than these."""
        further = self._scores - other._scores
        error = float(further.std()) / math.sqrt(len(further))
        return float(further.mean()) > (0 if self.summed else math.log(factor)) + errors * error


@dataclass(frozen=True)
class _Doubt:
    """How much worse than a ``smaller`` fit, and than ``merged`` weights alone, a fit has to be to give way to them on
    some kind of inputs: as factors of its distance, beyond ``errors`` standard errors. Where these are negative it has
    to be surely better."""

    smaller: float
    merged: float
    errors: float


MATCHED = _Doubt(smaller=1.0, merged=1.0, errors=-CLEAR)
"""On inputs with the expert's own BatchNorm statistics more offsets have to be surely nearer than the next fewer."""
MADE = _Doubt(smaller=SURE, merged=SURE, errors=CLEAR)
MADE_UNSTEADY = _Doubt(smaller=UNSURE, merged=1 / SURE, errors=CLEAR)
"""Where nothing is normalised."""
OWN = _Doubt(smaller=1.0, merged=1.0, errors=-CLEAR)
"""On inputs of the task they have to be surely nearer than any fewer: these are a smaller file to the bit, so not
worse."""
TRAINED = _Doubt(smaller=1.0, merged=1.0, errors=0.0)
"""Of offsets that were trained on these inputs the mean divergence decides, which training lessens many times over."""


class _Trial:
    """One task's network on some inputs, and the expert's own answers to them."""

    def __init__(self, guard: Guard, fit: TaskFit, weights: Mapping[str, float], progress: Progress) -> None:
        self._guard, self._fit = guard, fit
        self._network = guard.weigher.models.filled(fit.task)
        steady = normalises(self._network.module)
        kinds, self._doubt = self._asked(steady, progress)
        self._examples = [example for kind in kinds for example in kind]
        if not self._examples:
            raise RetexError(f"{fit.expert.reference}: nothing tells what its network reads")
        ends = list(accumulate(len(kind) for kind in kinds))
        self._kinds = [slice(end - len(kind), end) for kind, end in zip(kinds, ends, strict=True) if kind]
        self._wanted = self._answers()
        self._ways = [weights] if steady or "effects" in guard.without else [weights, self._by_effect(weights)]
        unmatched = bool(batchnorm_layers(self._network.module))
        self.doubtful = (UNMATCHED if unmatched else LITTLE) if self._doubt is MADE else ""

    def _asked(self, steady: bool, progress: Progress) -> tuple[Sequence[Sequence[Example]], _Doubt]:
        """What the network, which holds the expert, is asked, kind by kind, and how far its answers are believed."""
        if given := self._guard.weigher.inputs.get(self._fit.task):
            return [given], TRAINED if self._guard.trained else OWN
        if moved := self._guard.weigher.of(self._fit, progress).moved:
            return [moved], MATCHED
        made = probes(self._network)
        return ([made], MADE) if steady else ([made, flat(made)], MADE_UNSTEADY)

    def choose(self, first: Fit, fresh: Fresh, trimmed: Trimmed) -> Choice:
        """See ``Guard.choose``."""
        layout, whole = layout_of(self._guard.merged), first.budget
        merged = self._tried(OffsetFitter(layout, 0).encode({}), 0, self._guard.alone)
        kept, doubt = self._tried(first.data, whole), self._doubt
        untouched = kept.mean

        def made(budget: int) -> _Tried:
            return min((self._tried(fresh(budget, weights), budget) for weights in self._ways), key=_mean)

        def gives_way(to: _Tried) -> bool:
            factor = doubt.smaller if to.budget else doubt.merged
            return any(kept.on(kind).worse(to.on(kind), factor, doubt.errors) for kind in self._kinds)

        def falls(to: _Tried) -> bool:
            return gives_way(to) or gives_way(merged)

        try:
            kept = min([kept, *(self._tried(fresh(whole, weights), whole) for weights in self._ways[1:])], key=_mean)
            for rung in _rungs(layout, whole):
                quickly = len(self._ways) == 1 and doubt is not OWN and kept.budget == whole
                if quickly and not falls(self._tried(trimmed(rung), rung)):
                    break
                smaller = made(rung)
                if falls(smaller):
                    kept = smaller  # what a file of that budget is fitted to, and so looks at in the same way
                elif doubt is not OWN:
                    break
        except BudgetTooSmall:
            pass
        kept = merged if gives_way(merged) else kept
        return Choice(kept.data, kept.budget, len(self._examples), kept.mean, untouched, merged.mean)

    def _by_effect(self, weights: Mapping[str, float]) -> dict[str, float]:
        """See ``halfway``."""
        found = halfway(effects(self._network, self._examples[self._kinds[0]]))
        ours = {self._network.own_name(theirs): name for name, theirs in self._fit.alignment.shared.items()}
        known = {ours[name]: effect for name, effect in found.items() if name in ours}
        return {name: weight * weights.get(name, 1.0) for name, weight in known.items()}

    def _tried(self, data: bytes, budget: int, merged: Checkpoint | None = None) -> _Tried:
        """The expert that these offsets recover, asked."""
        task, merged = self._fit.task, merged or self._guard.merged
        predictor = Predictor({task: decode(data, layout_of(merged))})
        own = self._network.module.state_dict()
        for name, theirs in self._fit.alignment.shared.items():
            value = predictor.add_to(name, merged.read(name), {task: 1.0}, self._network.device)
            place = own.get(self._network.own_name(theirs))
            if place is not None:  # in place, as a second copy would count; an expert may have more rows
                (place[: len(value)] if value.ndim else place).copy_(value)
        if self._doubt is TRAINED:
            return _Tried(data, budget, diverged(self._answers(), self._wanted), summed=True)
        return _Tried(data, budget, apart(self._answers(), self._wanted))

    def _answers(self) -> Tensor:
        """To all inputs, on the CPU."""

        def forward(inputs: Inputs) -> Tensor:
            with self._network.inference():
                return thinned(answer_of(self._network.module(**inputs))).cpu()

        return run(self._network, self._examples, forward, BATCH, self._guard.weigher.threads, Silent()).whole()


def _mean(tried: _Tried) -> float:
    return tried.mean


def _rungs(layout: Sequence[tuple[str, Shape]], budget: int) -> Iterator[int]:
    """Smaller budgets than ``budget``, large ones first."""
    nbytes = 4 * sum(math.prod(shape) for _, shape in layout)
    for share in reversed(LADDER):
        if share * nbytes <= SMALLER * budget:
            yield int(share * nbytes)
