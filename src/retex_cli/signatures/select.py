"""Which layers, which score, how much shrinkage: decided on the reference inputs, each judged without itself.

The measure is the leave-one-out cross-entropy of the task at the calibrated temperature, which ranks choices far more
reliably than the error count of a few hundred inputs. As even that is noisy at 32 inputs a task, the preferred layers
and the usual own share are left only for others that are better by two standard errors of the paired difference, input
by input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from retex_cli.signatures import gaussian, residual
from retex_cli.signatures.calibrate import fit_temperature, losses, owners
from retex_cli.signatures.features import Layout, concatenate, layer_weights, layer_widths
from retex_cli.signatures.scatter import floored

SHRINKAGES = (0.9, 0.75, 0.5, 0.3, 0.15, 0.05)
OWN_SHARES = (0.0, 0.1, 0.25, 0.5, 1.0)
USUAL = (0.5, 0.25)
"""Shrinkage and own share at which sets of layers are compared before the best are tuned."""

FEWEST_LAYERS, MOST_LAYERS = 4, 8
"""Every second layer is preferred, within these limits."""

STANDARD_ERRORS = 2.0


@dataclass(frozen=True, slots=True)
class Choice:
    """One identifier: ``kind`` "mahalanobis" with its two numbers, or "residual", which has none.

    ``losses`` [N] and ``scores`` [N, T] are those of every reference input without itself.
    """

    layout: Layout
    kind: str
    shrinkage: float
    own: float
    temperature: float
    scores: torch.Tensor
    losses: torch.Tensor

    @property
    def loss(self) -> float:
        """Mean over the inputs, in nats."""
        return float(self.losses.mean())


def choice(
    layout: Layout, kind: str, shrinkage: float, own: float, scores: torch.Tensor, owner: torch.Tensor
) -> Choice:
    """With the best temperature for leave-one-out ``scores`` [N, T] of inputs that belong to the tasks ``owner``."""
    temperature = fit_temperature(scores, owner)
    return Choice(layout, kind, shrinkage, own, temperature, scores, losses(scores, owner, temperature))


def evenly(layer_count: int, wanted: int) -> tuple[int, ...]:
    """``wanted`` layers from first to last, evenly spaced; all of them where there are no more."""
    if wanted >= layer_count:
        return tuple(range(layer_count))
    return tuple(round(i * (layer_count - 1) / (wanted - 1)) for i in range(wanted))


def layer_sets(layer_count: int) -> list[tuple[int, ...]]:
    """The preferred set first, then other even spacings, the layers between the preferred ones, each layer alone."""
    preferred = evenly(layer_count, min(max((layer_count + 1) // 2, FEWEST_LAYERS), MOST_LAYERS))
    between = tuple((a + b) // 2 for a, b in pairwise(preferred) if b - a > 1)
    others = [evenly(layer_count, wanted) for wanted in (3, 2, FEWEST_LAYERS, 5, 6, MOST_LAYERS)]
    singles = [(layer,) for layer in range(layer_count)]
    return [layers for layers in dict.fromkeys([preferred, *others, between, *singles]) if layers]


@dataclass(frozen=True, slots=True)
class Rows:
    """Per task float64 [n_t, k] vectors with the inner products of some concatenated layers about a common origin, the
    sum [k, k] of their scatter matrices, and the mean variance of one original dimension within tasks."""

    layers: tuple[int, ...]
    parts: tuple[torch.Tensor, ...]
    gram: torch.Tensor
    variance: float


class Judge:
    """Scores candidate identifiers on ``units``: per task float64 [n_t, L, D] unit layers."""

    def __init__(self, units: Sequence[torch.Tensor]) -> None:
        self.units = units
        self.counts = [len(unit) for unit in units]
        self.owner = owners(self.counts)
        self.weights, self.widths = layer_weights(units), layer_widths(units)
        self.layer_count, self.width = units[0].shape[1:]

    def layout(self, layers: tuple[int, ...]) -> Layout:
        """Those layers with the weights that equalise them."""
        weights = tuple(self.weights[layer] for layer in layers)
        return Layout(layers, weights, tuple(self.widths[layer] for layer in layers), self.layer_count, self.width)

    def rows(self, layers: tuple[int, ...]) -> Rows:
        """The concatenated layers of all tasks."""
        parts = [concatenate(unit, self.layout(layers)) for unit in self.units]
        size = sum(self.counts) * parts[0].shape[1]
        within = sum(float(((part - part.mean(0)) ** 2).sum()) for part in parts) / size
        energy = sum(float((part.mean(0) ** 2).mean()) for part in parts) / len(parts)
        small = gaussian.compact(parts)
        centred = torch.cat(gaussian.centre(small)[1])
        return Rows(layers, tuple(small), centred.T @ centred, floored(within, energy))

    def gaussian(self, rows: Rows, shrinkage: float, own: float) -> Choice:
        """The regularised discriminant with these numbers."""
        weights = gaussian.weights(self.counts, rows.variance, shrinkage, own)
        scores = gaussian.leave_each_out(rows.parts, weights, rows.gram)
        return choice(self.layout(rows.layers), "mahalanobis", shrinkage, own, scores, self.owner)

    def residual(self, layers: tuple[int, ...]) -> Choice:
        """The distance to task subspaces in these layers."""
        rows = [concatenate(unit, self.layout(layers)) for unit in self.units]
        return choice(self.layout(layers), "residual", 0.0, 0.0, residual.leave_each_out(rows), self.owner)

    def screened(self, layers: tuple[int, ...]) -> Choice:
        """The discriminant with the usual numbers."""
        return self.gaussian(self.rows(layers), *USUAL)

    def tuned(self, layers: tuple[int, ...]) -> Choice:
        """Best shrinkage at the usual own share; another share, with its best shrinkage, where it is clearly better."""
        rows = self.rows(layers)
        usual = USUAL[1]
        best = self._least([self.gaussian(rows, shrinkage, usual) for shrinkage in SHRINKAGES])
        other = self._least([self.gaussian(rows, best.shrinkage, own) for own in OWN_SHARES if own != usual])
        if not clearly_better(other, best):
            return best
        rest = [self.gaussian(rows, value, other.own) for value in SHRINKAGES if value != other.shrinkage]
        return self._least([other, *rest])

    @staticmethod
    def _least(tried: Sequence[Choice]) -> Choice:
        return min(tried, key=lambda choice: choice.loss)


def clearly_better(challenger: Choice, champion: Choice) -> bool:
    """Lower loss by more than two standard errors of the mean paired difference."""
    gain = champion.losses - challenger.losses
    if len(gain) < 2:
        return False
    return float(gain.mean()) > STANDARD_ERRORS * float(gain.std()) / math.sqrt(len(gain)) + 1e-12


def select(units: Sequence[torch.Tensor]) -> Choice:
    """The identifier to use for these reference inputs; with a single task there is nothing to compare."""
    judge = Judge(units)
    preferred, *others = layer_sets(judge.layer_count)
    if len(units) == 1:
        return judge.screened(preferred)
    usual = judge.screened(preferred)
    challengers = [judge.residual(preferred)]
    champion = judge.tuned(preferred)
    promising = [found for found in map(judge.screened, others) if found.loss < usual.loss]
    if promising:
        best = min(promising, key=lambda c: c.loss).layout.layers
        challengers += [judge.tuned(best), judge.residual(best)]
    better = [challenger for challenger in challengers if clearly_better(challenger, champion)]
    return min(better, key=lambda c: c.loss) if better else champion
