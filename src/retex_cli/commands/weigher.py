"""What errors in the tensors of a network with BatchNorm count: by how much they change what it answers.

BatchNorm gives a layer before it any scale, so what an offset has of the energy of all says little of what it does, and
of two layers with equal energies one may matter a hundred times as much. The expert's own network tells: it is asked
the task's inputs, or, where nobody gave any, inputs moved until its BatchNorm layers see in them what they saw in
training.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from retex_cli.commands.expert_models import ExpertModels
from retex_cli.commands.task_fit import TaskFit
from retex_cli.errors import RetexError
from retex_cli.io.align import Alignment
from retex_cli.io.inputs import Example
from retex_cli.io.scratch import Scratch
from retex_cli.models.batchnorm import batchnorm_layers
from retex_cli.models.effects import effects
from retex_cli.models.matched import GROUP, STEPS, matched
from retex_cli.models.network import Network
from retex_cli.models.probes import PROBES, SOURCE, probes
from retex_cli.offsets.batchnorm import NORM_WEIGHT, Norm, norms, weights
from retex_cli.offsets.stream import Shape
from retex_cli.progress import Progress

WEIGHED = "/weighed/"
"""Before the names of pieces that are put aside; no task's name has a slash."""


@dataclass(frozen=True)
class Weighed:
    """What one expert's network told. ``weights``: what a squared error in a tensor counts, by merged names;
    ``epsilons``: what each BatchNorm layer adds to a variance, by that tensor's merged name; ``moved``: the inputs that
    were made for it, if any were."""

    weights: Mapping[str, float]
    epsilons: Mapping[str, float]
    moved: tuple[Example, ...] = ()


@dataclass(frozen=True)
class Weigher:
    """Asks experts' networks with BatchNorm, once each: answers are put aside in ``scratch``.

    ``layout``: of the merged checkpoint; ``inputs``: tasks' own, where they are read anyway; ``without``: see
    ``fit_parts``.
    """

    models: ExpertModels
    layout: Sequence[tuple[str, Shape]]
    inputs: Mapping[str, Sequence[Example]]
    threads: int
    scratch: Scratch
    without: frozenset[str] = frozenset()

    def work(self, task: str) -> int:
        """Steps that moving inputs for a task's network takes, if it can be run: see ``matched``."""
        return STEPS * -(-PROBES // GROUP) if self._moves(task) and norms(self.layout) else 0

    def _moves(self, task: str) -> bool:
        return task not in self.inputs and not self.without >= {"effects", "compare"}

    def of(self, fit: TaskFit, progress: Progress) -> Weighed:
        """What is known of a task's expert; where there is no BatchNorm, or no network to be run, what is usual."""
        place = f"{WEIGHED}{fit.task}"
        if fit.lossless or not norms(self.layout):
            return Weighed(weights(self.layout), {})
        piece = self.scratch.get(place)
        if piece is None:
            found = self._asked(fit, progress)
            tensors = [example.tensors or {} for example in found.moved]
            stacked = {name: torch.stack([each[name] for each in tensors]) for name in (tensors[0] if tensors else ())}
            texts = {"weights": json.dumps(found.weights), "epsilons": json.dumps(found.epsilons)}
            self.scratch.put(place, stacked, texts)
            piece = self.scratch.get(place)
            assert piece is not None, "it was put there just now"
        kept, told = piece
        moved = tuple(Example(tensors={name: row}, source=SOURCE) for name, rows in kept.items() for row in rows)
        return Weighed(json.loads(told["weights"]), json.loads(told["epsilons"]), moved)

    def _asked(self, fit: TaskFit, progress: Progress) -> Weighed:
        try:
            network = self.models.filled(fit.task)
        except RetexError:  # who compares answers says so
            return Weighed(weights(self.layout), {})
        layers = norm_layers(network, fit.alignment, self.layout)
        epsilons = {norm.variance: layer.eps for norm, layer in layers.items()}
        moved: tuple[Example, ...] = ()
        if self._moves(fit.task) and (made := probes(network)):
            moved = matched(network, made, self.threads, progress)
        asked = self.inputs.get(fit.task) or moved
        if not asked or "effects" in self.without:
            return Weighed(weights(self.layout), epsilons, moved)
        return Weighed(self._by_effect(network, fit.alignment, layers, asked), epsilons, moved)

    def _by_effect(
        self, network: Network, alignment: Alignment, layers: Mapping[Norm, _BatchNorm], asked: Sequence[Example]
    ) -> dict[str, float]:
        """Half-way between effects and energy, see ``halfway``; those of statistics follow from what weights and biases
        do."""
        found = effects(network, asked)
        names = {name: network.own_name(theirs) for name, theirs in alignment.shared.items()}
        known = {name: found[own] for name, own in names.items() if own in found}
        for norm, layer in layers.items():
            if norm.weight not in known or norm.bias not in known:
                continue
            gain, variance = layer.weight.detach().double().square(), layer.running_var
            assert isinstance(variance, Tensor), "a layer of `layers` keeps statistics"
            known[norm.variance] = known[norm.weight] * float(gain.mean())
            known[norm.mean] = known[norm.bias] * float((gain / (variance + layer.eps)).mean())
        counts = halfway(known)
        matrices = [counts[name] for name, shape in self.layout if len(shape) > 1 and counts.get(name)]
        usual = math.exp(sum(map(math.log, matrices)) / len(matrices)) if matrices else 1.0
        counts = {name: count / usual for name, count in counts.items()}
        for norm in layers:
            counts |= {name: NORM_WEIGHT * counts[name] for name in norm.names if name in counts}
        return counts


def halfway(found: Mapping[str, float]) -> dict[str, float]:
    """What errors count by tensors' effects on answers: their root, so half-way (as geometric mean) to what they count
    for by their energy alone, as effects of errors as large as those of a small file are not in proportion."""
    return {name: math.sqrt(effect) for name, effect in found.items()}


def norm_layers(network: Network, alignment: Alignment, layout: Sequence[tuple[str, Shape]]) -> dict[Norm, _BatchNorm]:
    """The layers of ``network`` that keep running statistics, all four of whose vectors have offsets."""
    layers = batchnorm_layers(network.module)
    names = {name: network.own_name(theirs) for name, theirs in alignment.shared.items()}
    return {
        norm: layers[place]
        for norm in norms(layout)
        if (place := names.get(norm.variance, "").removesuffix(".running_var")) in layers
        and all(name in names for name in norm.names)
    }
