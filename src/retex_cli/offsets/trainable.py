"""Kept components as parameters of a training that sees their quantiser.

Entries are held at unit variance; what the decoder would make of them goes forward, and gradients pass the rounding
unchanged (the straight-through estimator, arXiv 1308.3432). So the loss is that of the file, not of what is rounded to
make it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from retex_cli.offsets.quantiser import SHIFTS, dequantised, step
from retex_cli.offsets.stream import Context, contexts

SMALLEST = 1e-12


@dataclass(frozen=True)
class Kept:
    """The kept components of one tensor: ``left`` float32 [m, k] with their scales, ``right`` [k, n] of unit variance
    per entry (None for one-dimensional tensors, whose ``left`` is [m, 1]), and their levels."""

    left: Tensor
    right: Tensor | None
    levels: tuple[int, ...]


class Side:
    """Vectors of one side of one tensor: ``entries`` [k, length], of about unit variance, are what is trained."""

    def __init__(self, entries: Tensor, scales: Tensor, used: tuple[Context, ...]) -> None:
        self.entries = entries.clone().requires_grad_()
        self._scales = scales[:, None]
        self._contexts = used
        self._steps = torch.tensor([step(level) for level, _ in used], dtype=torch.float32)[:, None]
        self._shifts = torch.zeros(len(used), SHIFTS + 1)

    def decoded(self) -> Tensor:
        """[k, length] as a decoder would have it, with its scale; gradients reach ``entries``."""
        unit = self.entries.detach()
        scale = unit.square().mean(1, keepdim=True).sqrt().clamp_min(SMALLEST)
        back = dequantised(unit / scale, self._steps, self._shifts) * scale
        return (self.entries + (back - unit)) * self._scales

    def settle(self, pools: Mapping[Context, Tensor]) -> None:
        """Take the shifts of every context, float32 [SHIFTS] in steps."""
        self._shifts = torch.stack([torch.cat([torch.zeros(1), pools[context]]) for context in self._contexts])

    def normalised(self) -> Iterator[tuple[Context, Tensor]]:
        """Every vector at exactly unit variance, with its context."""
        unit = self.entries.detach()
        scale = unit.square().mean(1, keepdim=True).sqrt().clamp_min(SMALLEST)
        yield from zip(self._contexts, unit / scale, strict=True)

    def values(self) -> Tensor:
        """[k, length] before quantising, with scale."""
        return self.entries.detach() * self._scales


class Trainable:
    """All kept components of one task."""

    def __init__(self, kept: Mapping[str, Kept]) -> None:
        self._levels = {name: components.levels for name, components in kept.items()}
        self._left: dict[str, Side] = {}
        self._right: dict[str, Side] = {}
        for name, components in kept.items():
            m, n = len(components.left), 0 if components.right is None else components.right.shape[1]
            used = [contexts(level, m, n) for level in components.levels]
            columns = components.left.T.contiguous()
            scales = columns.square().mean(1).sqrt().clamp_min(SMALLEST)
            self._left[name] = Side(columns / scales[:, None], scales, tuple(left for left, _ in used))
            if components.right is not None:
                flat = torch.full((len(used),), 1 / math.sqrt(n))
                self._right[name] = Side(components.right, flat, tuple(right for _, right in used))
        self.settle()

    @property
    def parameters(self) -> list[Tensor]:
        """What an optimiser moves: entries of about unit variance, so that one step size suits all."""
        return [side.entries for side in self._sides()]

    def _sides(self) -> list[Side]:
        return [*self._left.values(), *self._right.values()]

    def factors(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Decoded (left [m, k], right [k, n] or None) of a tensor that has components."""
        right = self._right.get(name)
        return self._left[name].decoded().T, None if right is None else right.decoded()

    @property
    def names(self) -> list[str]:
        return list(self._levels)

    def settle(self) -> None:
        """Measure anew how far decoded values lie from the middles of their cells."""
        pools: dict[Context, list[Tensor]] = {}
        for side in self._sides():
            for context, vector in side.normalised():
                pools.setdefault(context, []).append(vector)
        shifts = {context: _shifts(torch.cat(vectors), context[0]) for context, vectors in pools.items()}
        for side in self._sides():
            side.settle(shifts)

    def kept(self) -> dict[str, Kept]:
        """The components as they are now, to be coded."""
        found = {}
        for name, levels in self._levels.items():
            left = self._left[name].values().T
            right = None
            if name in self._right:
                rows = self._right[name].entries.detach()
                scale = rows.square().mean(1).sqrt().clamp_min(SMALLEST)
                right, left = rows / scale[:, None], left * scale
            found[name] = Kept(left.clone(), right, levels)
        return found


def _shifts(vector: Tensor, level: int) -> Tensor:
    from retex_cli.offsets.quantiser import centroid_shifts, quantise

    return torch.tensor(centroid_shifts(vector, quantise(vector, level), level), dtype=torch.float32) / 64
