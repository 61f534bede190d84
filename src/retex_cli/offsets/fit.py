"""Fitting one task's offsets into a budget of bytes, from the weights alone (parameter distillation in closed form).

ReTeX (arXiv 2606.26902) fits low-rank offsets to the experts' parameters. With one adapter per task the best low-rank
fit is the truncated singular value decomposition (Eckart and Young); what is left to decide is how many bits each
component gets, and ``allocate`` decides it over all tensors at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from retex_cli.offsets import stream
from retex_cli.offsets.allocate import Candidates, allocate, minimum_bits
from retex_cli.offsets.decompose import Components, as_matrix, decompose
from retex_cli.offsets.quantiser import dequantise, quantise
from retex_cli.offsets.stream import Coded, Shape

TOLERANCE = 0.98
"""A fit stops looking once it uses at least this share of its budget (and never more than all of it)."""


class BudgetTooSmall(ValueError):
    """Not even one component fits; ``minimum`` is the number of bytes that would do."""

    def __init__(self, minimum: int) -> None:
        super().__init__(f"at least {minimum} bytes are needed")
        self.minimum = minimum


class OffsetFitter:
    """Grows tensor by tensor, then turns into bytes: ``update`` for every shared tensor, ``finish`` once.

    ``layout`` is every shared tensor's (name, shape) in sorted order; ``budget`` the bytes that ``finish`` may use.
    """

    def __init__(self, layout: Sequence[tuple[str, Shape]], budget: int) -> None:
        self._layout = list(layout)
        self._budget = budget
        self._components: dict[str, Components | Tensor] = {}

    def max_rank(self, shape: Shape) -> int:
        """More components than this cannot be paid from the budget."""
        return int(8 * self._budget // minimum_bits(sum(stream.sides(shape)), 2)) + 1

    def prepare(self, delta: Tensor) -> Components | Tensor:
        """The part of ``update`` that takes time and touches nothing shared, so threads may run it side by side."""
        if delta.ndim < 2:
            return delta.reshape(-1).clone()
        return decompose(as_matrix(delta), self.max_rank(tuple(delta.shape)))

    def update(self, name: str, prepared: Components | Tensor) -> None:
        """Takes what ``prepare`` made of the offset ``expert - merged`` (float32) of the tensor ``name``."""
        self._components[name] = prepared

    def finish(self) -> bytes:
        """The coded offsets: at most the budget, and at least ``TOLERANCE`` of it unless everything fits in less.

        Raises ``BudgetTooSmall`` when nothing useful fits.
        """
        candidates = [self._candidates(name) for name, _ in self._layout]
        if all(not (candidate.energies > 0).any() for candidate in candidates):
            return stream.encode([[] for _ in self._layout])  # the expert is the merged checkpoint
        best, best_levels = b"", None
        target, highest, lowest = 8.0 * self._budget, math.inf, 0.0
        for _ in range(12):
            levels = allocate(candidates, target)
            if levels == best_levels:
                break
            data = self._encode(levels)
            if len(data) <= self._budget:
                lowest = target
                if len(data) > len(best):
                    best, best_levels = data, levels
                if len(data) >= TOLERANCE * self._budget:
                    break
            else:
                highest = target
            guess = target * 0.995 * self._budget / len(data)
            target = guess if lowest < guess < highest else (lowest + min(highest, 2 * target)) / 2
        return best or self._least(candidates)

    def _least(self, candidates: list[Candidates]) -> bytes:
        """The one component that takes the fewest bytes, if the budget has them."""
        prices = [minimum_bits(c.entries, c.factors) if (c.energies > 0).any() else math.inf for c in candidates]
        cheapest = prices.index(min(prices))
        levels: list[list[int]] = [[] for _ in candidates]
        [levels[cheapest]] = allocate([candidates[cheapest]], prices[cheapest])
        data = self._encode(levels)
        if len(data) > self._budget:
            raise BudgetTooSmall(len(data))
        return data

    def _candidates(self, name: str) -> Candidates:
        kept = self._components.get(name)
        if kept is None:
            return Candidates(np.zeros(0), 0, 1)
        if isinstance(kept, Tensor):
            return Candidates(np.array([float(kept.double().square().sum())]), kept.numel(), 1)
        energies = kept.values.double().square().numpy()
        return Candidates(energies, kept.left.shape[0] + kept.right.shape[1], 2)

    def _encode(self, levels: list[list[int]]) -> bytes:
        return stream.encode([self._code(name, chosen) for (name, _), chosen in zip(self._layout, levels, strict=True)])

    def _code(self, name: str, levels: list[int]) -> list[Coded]:
        if not levels:
            return []
        kept = self._components[name]
        if isinstance(kept, Tensor):
            scale = stream.scale_code(float(kept.square().mean().sqrt()))
            return [Coded(levels[0], scale, quantise(kept / stream.scale_value(scale), levels[0]), None)]
        return _code_components(kept, levels)


def _code_components(components: Components, levels: list[int]) -> list[Coded]:
    """Quantise the right vectors, re-fit the left ones to what they became (least squares), quantise those."""
    width = components.right.shape[1]
    unit = math.sqrt(width)
    right = [quantise(row * unit, level) for row, level in zip(components.right, levels, strict=False)]
    decoded = torch.stack([dequantise(row, level) for row, level in zip(right, levels, strict=True)]) / unit
    gram = (decoded @ decoded.T).double()
    ridge = 1e-6 * float(gram.diagonal().mean()) * torch.eye(len(levels), dtype=torch.float64)
    mixing = torch.linalg.solve(gram + ridge, (decoded @ components.right.T).double()).float()  # [kept, k]
    left = (components.left * components.values) @ mixing.T
    coded = []
    for column, row, level in zip(left.T, right, levels, strict=True):
        scale = stream.scale_code(max(float(column.square().mean().sqrt()), 1e-30))
        coded.append(Coded(level, scale, quantise(column / stream.scale_value(scale), level), row))
    return coded
