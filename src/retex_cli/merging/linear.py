"""Merges that combine whole tensors linearly: the weights depend on few numbers per tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from retex_cli.errors import UsageError
from retex_cli.merging.options import Number, each
from retex_cli.merging.reduce import products, task_vectors
from retex_cli.merging.view import Kernel, View

COLINEAR = 0.9995
"""Beyond this cosine the angle is too small to divide by its sine: interpolate linearly."""


def sum_rows(rows: Tensor) -> Tensor:
    """Sum of ``rows [T, n]`` over T, ``[n]``, one row after the other: the same bits however n is cut."""
    if rows.device.type == "cpu":  # one call where torch would take T: workers wait for each other less
        return torch.from_numpy(np.add.reduce(rows.numpy(), axis=0))
    first, *others = rows.unbind(0)
    total = first.clone()
    for row in others:
        total.add_(row)
    return total


def weigh_(rows: Tensor, weights: Sequence[float]) -> Tensor:
    """Multiply each of ``rows [T, n]`` by its weight; a weight of 1 costs nothing."""
    for row, weight in zip(rows.unbind(0), weights, strict=True):
        if weight != 1:
            row.mul_(weight)
    return rows


def sum_scale(alpha: float, weights: Sequence[float], normalise: bool) -> float:
    """What a weighted sum is multiplied by: ``alpha``, over the sum of the weights if it is to be ``normalise``d.

    Weights that cancel are not divided by.
    """
    total = sum(weights)
    return alpha / total if normalise and abs(total) >= 1e-8 else alpha


def average(view: View, *, weight: Number = 1.0, normalise: bool = True) -> Kernel:
    """The mean of the experts' weights, each with a weight of its own if one is given.

    Model soups, arXiv 2203.05482: ``theta = sum_t w_t theta_t / sum_t w_t`` (the uniform soup by default), without the
    division if not ``normalise``. The base is not used. Raises ``UsageError`` for weights that add up to 0.
    """
    weights = each(weight, view.tasks)
    total = sum(weights) if normalise else 1.0
    if abs(total) < 1e-8:
        raise UsageError(
            f"the weights of method 'average' add up to {total:g} for tensor {view.name!r}",
            "give other weights, or --set normalise=false",
        )

    def merge(base: Tensor, experts: Tensor, start: int) -> Tensor:
        return sum_rows(weigh_(experts, weights)).div_(total)

    return Kernel(merge)


def mean_of_task_vectors(view: View, alpha: float = 1.0) -> Kernel:
    """``base + alpha / T sum_t tau_t``: what the spectral methods do with tensors that are no matrices."""
    scale = alpha / len(view.tasks)

    def merge(base: Tensor, experts: Tensor, start: int) -> Tensor:
        return sum_rows(experts.sub_(base)).mul_(scale).add_(base)

    return Kernel(merge)


def task_arithmetic(view: View, *, alpha: float, weight: Number = 1.0, normalise: bool = False) -> Kernel:
    """The base plus the scaled, weighted sum of task vectors.

    arXiv 2212.04089, section 2: ``theta = theta_0 + alpha sum_t w_t tau_t``. The default ``alpha = 0.4`` is the
    one that the paper found to serve without validation data (as quoted in arXiv 2306.01708, section 4).
    """
    weights = each(weight, view.tasks)
    scale = sum_scale(alpha, weights, normalise)

    def merge(base: Tensor, experts: Tensor, start: int) -> Tensor:
        return sum_rows(weigh_(experts.sub_(base), weights)).mul_(scale).add_(base)

    return Kernel(merge)


def slerp(view: View, *, t: float) -> Kernel:
    """Spherical interpolation between the weights of two experts, from the first name (``t = 0``) to the second.

    Shoemake 1985, https://doi.org/10.1145/325165.325242, on each tensor as one vector: with the angle O between them,
    ``sin((1 - t) O) / sin O * a + sin(t O) / sin O * b``. Linear where they are all but parallel. The base is not used.
    """
    if len(view.tasks) != 2:
        first, second = 1.0, 0.0
    else:
        first, second = _slerp_weights(products(view, lambda base, experts: experts), t)

    def merge(base: Tensor, experts: Tensor, start: int) -> Tensor:
        merged = experts[0].mul_(first)
        return merged.add_(experts[1].mul_(second)) if len(view.tasks) == 2 else merged

    return Kernel(merge)


def _slerp_weights(inner: Tensor, t: float) -> tuple[float, float]:
    (aa, ab), (_, bb) = inner.tolist()
    cosine = ab / math.sqrt(aa * bb) if aa * bb > 0 else 1.0
    if abs(cosine) > COLINEAR:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def model_stock(view: View, *, floor: float) -> Kernel:
    """Between the base and the mean of the experts, by the angle between their task vectors.

    arXiv 2403.19522, equation 7, for each tensor: ``theta = t mean + (1 - t) theta_0`` with
    ``t = T cos / (1 + (T - 1) cos)``, where cos is the mean cosine over all pairs of task vectors. A product of two
    norms below ``floor`` is taken for ``floor`` (mergekit takes 1e-6, which small vectors are below).
    """
    count = len(view.tasks)
    if count < 2:
        raise UsageError(
            f"method 'model_stock' needs two experts or more with tensor {view.name!r}, {view.tasks[0]!r} alone has it",
            "give another expert",
        )
    ratio = _stock_ratio(products(view, task_vectors), count, floor)

    def merge(base: Tensor, experts: Tensor, start: int) -> Tensor:
        return sum_rows(experts.sub_(base)).mul_(ratio / count).add_(base)

    return Kernel(merge)


def _stock_ratio(inner: Tensor, count: int, floor: float) -> float:
    norms = inner.diagonal().sqrt()
    cosines = inner / (norms[:, None] * norms).clamp(min=max(floor, 1e-30))
    mean = (cosines.sum() - cosines.diagonal().sum()).item() / (count * (count - 1))
    below = 1 + (count - 1) * mean
    return count * mean / below if below > 1e-9 else 0.0
