"""BatchNorm's four vectors as the two numbers a channel that its function has: a factor and a shift.

In use a layer computes ``(x - mean) weight / sqrt(var + eps) + bias``. With the merged mean and weight in place, some
variance and bias give an expert's function exactly, so offsets of these two are all that is coded: half the entries,
and errors of the shift that count in units of the layer's output instead of its input. A coded variance is off by a few
percent, and so is what it makes of the merged mean, which may be far from the expert's: the bias that is coded is the
one that goes with the coded variance, so that the layer's mean output is right whatever its factor (``Pivot``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retex_cli.offsets.domain import from_domain, to_domain
from retex_cli.offsets.stream import Shape

EPSILON = 1e-4
"""Assumed where no network says what its layers add to a variance: between torch's 1e-5 and TensorFlow's 1e-3."""
NORM_WEIGHT = 1 / 4
"""What an error in a layer's vectors counts of what its effect on answers says: statistics are small and many."""
SHIFT_WEIGHT = 1 / 8
"""What a squared error of a shift or of a factor's logarithm usually counts beside one in a convolution."""
DEPTHWISE_WEIGHT = 4.0
"""And one in a convolution of single channels, of whose few entries no errors average out."""
LARGEST = 1e4
"""Of a factor that a variance may have to make up for."""

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Norm:
    """Tensor names of one layer."""

    weight: str
    bias: str
    mean: str
    variance: str

    @property
    def names(self) -> tuple[str, str, str, str]:
        """All four."""
        return self.weight, self.bias, self.mean, self.variance


def norms(layout: Sequence[tuple[str, Shape]]) -> list[Norm]:
    """The layers of a checkpoint that have all four vectors, told by their names."""
    shapes = dict(layout)
    found = []
    for name in shapes:
        place, _, kind = name.rpartition("running_var")
        if kind or not name.endswith("running_var"):
            continue
        norm = Norm(f"{place}weight", f"{place}bias", f"{place}running_mean", name)
        if all(shapes.get(other) == shapes[name] and len(shapes[name]) == 1 for other in norm.names):
            found.append(norm)
    return found


@dataclass(frozen=True)
class Pivot:
    """The bias that goes with a variance, as offsets of both from the merged checkpoint, float32 [channels].

    An input at the expert's mean gives the expert's bias: ``offset = at_mean + lever / sqrt(var + epsilon)``, where
    ``lever`` is the merged weight times how far the merged mean lies above the expert's.
    """

    variance: str
    at_mean: Tensor
    lever: Tensor
    merged: Tensor
    epsilon: float

    def offset(self, of_variance: Tensor) -> Tensor:
        """Of the bias, for an offset of the variance (see ``domain``)."""
        variance = from_domain(self.variance, to_domain(self.variance, self.merged) + of_variance)
        return self.at_mean + self.lever * torch.rsqrt(variance + self.epsilon)


@dataclass(frozen=True)
class Folded:
    """What a layer comes down to: its four vectors, float32, by name, and what ties the bias to the variance."""

    values: dict[str, Tensor]
    pivots: dict[str, Pivot]


def folded(norm: Norm, expert: Read, merged: Read, epsilon: float) -> Folded:
    """The expert's function with the merged mean and weight.

    Its own vectors where a weight changes its sign, which no variance makes up for.
    """
    weight, bias, mean, variance = (expert(name).float() for name in norm.names)
    weight_0, bias_0, mean_0, variance_0 = (merged(name).float() for name in norm.names)
    if bool((weight.sign() != weight_0.sign()).any()):
        return Folded(dict(zip(norm.names, (weight, bias, mean, variance), strict=True)), {})
    factor = weight * torch.rsqrt(variance.clamp(min=0) + epsilon)
    deviation = torch.where(factor == 0, (variance_0 + epsilon).sqrt(), weight_0 / factor).clamp(max=LARGEST)
    variance = (deviation.square() - epsilon).clamp(min=0)
    pivot = Pivot(norm.variance, bias - bias_0, weight_0 * (mean_0 - mean), variance_0, epsilon)
    bias = bias_0 + pivot.offset(to_domain(norm.variance, variance) - to_domain(norm.variance, variance_0))
    return Folded(dict(zip(norm.names, (weight_0, bias, mean_0, variance), strict=True)), {norm.bias: pivot})


def weights(layout: Sequence[tuple[str, Shape]]) -> dict[str, float]:
    """What errors usually count in a network with BatchNorm, by tensor name, where it is not 1."""
    found = {name: SHIFT_WEIGHT for norm in norms(layout) for name in norm.names}
    if found:
        found |= {name: DEPTHWISE_WEIGHT for name, shape in layout if len(shape) == 4 and shape[1] == 1}
    return found
