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

from retex_cli.offsets.batchnorm import Pivot
from retex_cli.offsets.quantiser import (
    NORMAL,
    SHIFT_UNIT,
    SHIFTS,
    centroid_shifts,
    dequantised,
    quantise,
    step,
)
from retex_cli.offsets.stream import Context, contexts, scale_code, scale_value

SMALLEST = 1e-12


@dataclass(frozen=True)
class Kept:
    """The kept components of one tensor: ``left`` float32 [m, k] with their scales, ``right`` [k, n] of unit variance
    per entry (None for one-dimensional tensors, whose ``left`` is [m, 1]), and their levels."""

    left: Tensor
    right: Tensor | None
    levels: tuple[int, ...]

    def worth(self) -> list[tuple[float, float]]:
        """Squared norm and bits, roughly, of every component."""
        energies, length = self.left.square().sum(0), len(self.left)
        if self.right is not None:
            energies, length = energies * self.right.square().mean(1), length + self.right.shape[1]
        return [(float(e), length * float(NORMAL.rates[level])) for e, level in zip(energies, self.levels, strict=True)]

    def without(self, gone: set[tuple[str, int]], name: str) -> Kept | None:
        """The components of tensor ``name`` that are not ``gone``; None if there are none."""
        stay = [i for i in range(len(self.levels)) if (name, i) not in gone]
        if not stay:
            return None
        right = None if self.right is None else self.right[stay]
        return Kept(self.left[:, stay], right, tuple(self.levels[i] for i in stay))


class Side:
    """Vectors of one side of one tensor: ``entries`` [k, length], of about unit variance, are what is trained.

    Right vectors have a fixed length in the file; the scale of a left one is coded, in steps. ``base`` [k, length] is
    added to the entries: what they follow, and what is trained is what there is beside it.
    """

    def __init__(self, entries: Tensor, scales: Tensor, used: tuple[Context, ...], *, coded: bool) -> None:
        self.entries = entries.clone().requires_grad_()
        self.base = torch.zeros(())
        self._scales, self._coded = scales[:, None], coded
        self._contexts = used
        self._steps = torch.tensor([step(level) for level, _ in used], dtype=torch.float32)[:, None]
        self._shifts = torch.zeros(len(used), SHIFTS + 1)

    @property
    def _whole(self) -> Tensor:
        return self.entries + self.base

    def follow(self, offset: Tensor) -> None:
        """Add the one vector ``offset`` [length], at its scale, to what is trained; gradients reach it."""
        self.base = offset[None] / self._scales

    def _spread(self) -> Tensor:
        """[k, 1]: what entries are divided by before they are rounded."""
        spread = self._whole.detach().square().mean(1, keepdim=True).sqrt().clamp_min(SMALLEST)
        if not self._coded:
            return spread
        codes = [scale_code(max(value, SMALLEST)) for value in (spread * self._scales).flatten().tolist()]
        return torch.tensor([scale_value(code) for code in codes])[:, None] / self._scales

    def decoded(self) -> Tensor:
        """[k, length] as a decoder would have it, with its scale; gradients reach ``entries`` and ``base``."""
        spread = self._spread()
        unit = self._whole / spread
        back = dequantised(unit.detach(), self._steps, self._shifts)
        seen = unit + (back - unit.detach())
        return seen * (self._scales * spread if self._coded else self._scales)

    def settle(self, pools: Mapping[Context, Tensor]) -> None:
        """Take the shifts of every context, float32 [SHIFTS] in steps."""
        self._shifts = torch.stack([torch.cat([torch.zeros(1), pools[context]]) for context in self._contexts])

    def units(self) -> Iterator[tuple[Context, Tensor]]:
        """Every vector as it is rounded, with its context."""
        yield from zip(self._contexts, self._whole.detach() / self._spread(), strict=True)

    def values(self) -> Tensor:
        """[k, length] to be coded: with their scale, or of unit variance where it is fixed."""
        entries = self._whole.detach()
        return entries * self._scales if self._coded else entries / self._spread()


class Trainable:
    """All kept components of one task. ``pivots``: what some of them follow, by name; these start there."""

    def __init__(self, kept: Mapping[str, Kept], pivots: Mapping[str, Pivot]) -> None:
        self._pivots = {name: pivot for name, pivot in pivots.items() if name in kept}
        self._levels = {name: components.levels for name, components in kept.items()}
        self._left: dict[str, Side] = {}
        self._right: dict[str, Side] = {}
        for name, components in kept.items():
            m, n = len(components.left), 0 if components.right is None else components.right.shape[1]
            used = [contexts(level, m, n) for level in components.levels]
            columns = components.left.T.contiguous()
            scales = columns.square().mean(1).sqrt().clamp_min(SMALLEST)
            entries = torch.zeros_like(columns) if name in self._pivots else columns / scales[:, None]
            self._left[name] = Side(entries, scales, tuple(left for left, _ in used), coded=True)
            if components.right is not None:
                flat = torch.full((len(used),), 1 / math.sqrt(n))
                self._right[name] = Side(components.right, flat, tuple(right for _, right in used), coded=False)
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
        self._follow(name)
        return self._left[name].decoded().T, None if right is None else right.decoded()

    def _follow(self, name: str) -> None:
        """Have a tensor's offset follow what the other's is decoded to at this moment, if it follows one."""
        if (pivot := self._pivots.get(name)) is not None:
            other = self._left.get(pivot.variance)
            self._left[name].follow(pivot.offset(torch.zeros(()) if other is None else other.decoded()[0]))

    @property
    def names(self) -> list[str]:
        return list(self._levels)

    def settle(self) -> None:
        """Measure anew how far decoded values lie from the middles of their cells."""
        for name in self._pivots:
            self._follow(name)
        pools: dict[Context, list[Tensor]] = {}
        for side in self._sides():
            for context, vector in side.units():
                pools.setdefault(context, []).append(vector)
        shifts = {context: _shifts(torch.cat(vectors), context[0]) for context, vectors in pools.items()}
        for side in self._sides():
            side.settle(shifts)

    def kept(self) -> dict[str, Kept]:
        """The components as they are now, to be coded."""
        for name in self._pivots:
            self._follow(name)
        return {
            name: Kept(
                self._left[name].values().T.clone(),
                self._right[name].values() if name in self._right else None,
                levels,
            )
            for name, levels in self._levels.items()
        }


def _shifts(vector: Tensor, level: int) -> Tensor:
    return torch.tensor(centroid_shifts(vector, quantise(vector, level), level), dtype=torch.float32) / SHIFT_UNIT
