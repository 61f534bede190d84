"""From pooled hidden states to one vector per input: which layers, normalised how, scaled how.

An input arrives as float [L, D]: its L layer outputs (the embedding output included), each mean-pooled over tokens.
Layers differ in spread by a factor of several, so each is L2-normalised and then multiplied by a weight that gives all
of them the same spread within tasks; weights are per layer and not per dimension, because a dimension that is constant
on the reference inputs (real encoders have some) would be blown up to noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from retex_cli.errors import RetexError

SMALLEST_SPREAD = 1e-3
"""A layer that varies less than this share of its own norm is not amplified any further."""

EMPTY_NORM = 1e-12
"""Below this length a vector has no direction: it stays zero."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How ``[m, L, D]`` features become ``[m, size]`` vectors: of each of ``layers`` the first entries, as many as its
    entry of ``widths``, times its entry of ``weights``. What lies beyond was zero in every reference input: padding."""

    layers: tuple[int, ...]
    weights: tuple[float, ...]
    widths: tuple[int, ...]
    layer_count: int
    width: int

    @property
    def size(self) -> int:
        """Entries of one vector."""
        return sum(self.widths)


def check(features: torch.Tensor, place: str, *, least: int = 1) -> None:
    """Refuse anything but a finite floating ``[n >= least, L, D]`` array, naming ``place``."""
    if features.ndim != 3 or 0 in features.shape[1:] or not features.is_floating_point():
        raise RetexError(
            f"{place}: features are {str(features.dtype).removeprefix('torch.')} {list(features.shape)}, "
            "expected floating [inputs, layers, width]",
            "Pool every layer output over its tokens and stack the layers.",
        )
    if len(features) < least:
        raise RetexError(
            f"{place}: {len(features)} inputs, at least {least} are needed",
            "Give 32 to 256 inputs per task." if least > 1 else None,
        )
    if math.isfinite(features.sum()):  # far quicker than looking at every number, as identification does each time
        return
    finite = torch.isfinite(features).flatten(1).all(1)
    if not finite.all():
        row = int(finite.logical_not().nonzero()[0, 0])
        raise RetexError(
            f"{place}: NaN or infinity in the features of input {row}",
            "Look at that input, or run the encoder in float32.",
        )


def check_layout(features: torch.Tensor, layout: Layout, place: str) -> None:
    """Refuse features of another encoder shape than the one the signatures were fitted on."""
    found, expected = tuple(features.shape[1:]), (layout.layer_count, layout.width)
    if found != expected:
        raise RetexError(
            f"{place}: {found[0]} layers of width {found[1]}, the signatures have {expected[0]} of {expected[1]}",
            "Compute the features with the encoder the signatures were built on.",
        )


def check_tasks(features: Mapping[str, torch.Tensor]) -> None:
    """Refuse an empty set of tasks, fewer than two inputs, and tasks whose layers or widths disagree."""
    if not features:
        raise RetexError("no task to fit signatures on", "Name at least one task with its reference inputs.")
    first: str | None = None
    for name in sorted(features):
        check(features[name], f"task {name!r}", least=2)
        first = name if first is None else first
        here, there = tuple(features[name].shape[1:]), tuple(features[first].shape[1:])
        if here != there:
            raise RetexError(
                f"task {name!r} has {here[0]} layers of width {here[1]}, task {first!r} has {there[0]} of {there[1]}",
                "Compute every task's features with the same encoder.",
            )


def unit_layers(features: torch.Tensor) -> torch.Tensor:
    """``[n, L, D]`` in float64, every layer of every input scaled to length one."""
    exact = features.to(torch.float64)
    units: torch.Tensor = exact / exact.norm(dim=2, keepdim=True).clamp(min=EMPTY_NORM)
    return units


def layer_weights(units: Sequence[torch.Tensor]) -> tuple[float, ...]:
    """Per layer, one over the root mean square that ``[n, L, D]`` unit layers have about their own task's mean.

    Squares are pooled over tasks, inputs and dimensions, so a weighted layer has unit variance within tasks.
    """
    squares = sum(((unit - unit.mean(0)) ** 2).sum((0, 2)) for unit in units)
    assert isinstance(squares, torch.Tensor)
    width = units[0].shape[2]
    spread = (squares / (sum(len(unit) for unit in units) * width)).sqrt()
    floor = SMALLEST_SPREAD / width**0.5
    return tuple(float(value) for value in 1.0 / spread.clamp(min=floor))


def layer_widths(units: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Per layer of ``[n, L, D]`` unit layers, how many entries there are up to the last that is not zero throughout."""
    used = torch.stack([(unit != 0).any(0) for unit in units]).any(0)
    places = torch.arange(1, used.shape[1] + 1)
    return tuple(max(1, int(width)) for width in (used * places).amax(1))


def concatenate(units: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Weighted layers of ``[n, L, D]`` unit layers side by side: ``[n, layout.size]`` of their type."""
    chosen = zip(layout.layers, layout.widths, layout.weights, strict=True)
    return torch.cat([units[:, layer, :width] * weight for layer, width, weight in chosen], 1)


def vectors(features: torch.Tensor, layout: Layout) -> torch.Tensor:
    """``[m, L, D]`` features as float32 ``[m, layout.size]`` vectors, for scoring: few operations, as one input at a
    time costs little else."""
    layers, weights, columns = _constants(layout)
    chosen = features.index_select(1, layers).to(torch.float32)
    lengths = torch.linalg.vector_norm(chosen, dim=2, keepdim=True).clamp_(min=EMPTY_NORM)
    scaled = chosen.mul_(weights / lengths).flatten(1)
    return scaled if columns is None else scaled.index_select(1, columns)


@lru_cache(maxsize=16)
def _constants(layout: Layout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Layers, weights [layers, 1], and which entries of the layers side by side are no padding; None where all are."""
    layers = torch.tensor(layout.layers)
    weights = torch.tensor(layout.weights, dtype=torch.float32)[:, None]
    if all(width == layout.width for width in layout.widths):
        return layers, weights, None
    starts = range(0, len(layout.widths) * layout.width, layout.width)
    columns = [torch.arange(start, start + width) for start, width in zip(starts, layout.widths, strict=True)]
    return layers, weights, torch.cat(columns)
