"""In what a tensor's offset is a difference: in its values, or, for the variances of BatchNorm, in their logarithms.

A variance divides. One that an offset leaves at or below zero turns every answer into NaN, and an error that is small
beside the largest variance of a layer is a factor for the smallest. The logarithm of the standard deviation stays
positive and has relative errors, which weigh about as much as those of the weights before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-5
"""Added to every variance, as BatchNorm does: a channel that is always off has none at all."""


def to_domain(name: str, tensor: Tensor) -> Tensor:
    """float32 of the same shape, in which experts and merged checkpoint are subtracted."""
    value = tensor.float()
    return (value.clamp(min=0) + EPSILON).log() / 2 if is_variance(name) else value


def from_domain(name: str, value: Tensor) -> Tensor:
    """The inverse, float32; a variance is never negative."""
    return (torch.exp(2 * value) - EPSILON).clamp(min=0) if is_variance(name) else value


def is_variance(name: str) -> bool:
    """Whether the tensor holds variances, by its name."""
    return name.rpartition(".")[2] == "running_var"
