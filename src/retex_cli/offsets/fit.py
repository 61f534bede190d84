"""Fitting one task's offsets into a budget of bytes, from the weights alone (parameter distillation in closed form).

ReTeX (arXiv 2606.26902) fits low-rank offsets to the experts' parameters. With one adapter per task the best low-rank
fit is the truncated singular value decomposition (Eckart and Young); what is left to decide is how many bits each
component gets, and ``allocate`` decides it over all tensors at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from retex_cli.offsets import stream
from retex_cli.offsets.allocate import Candidates, allocate
from retex_cli.offsets.batchnorm import Pivot
from retex_cli.offsets.decompose import Components, as_matrix, decompose
from retex_cli.offsets.quantiser import LEVELS, NORMAL, Curve, centroid_shifts, dequantise, measure, quantise
from retex_cli.offsets.stream import LONG, Coded, Context, Shape
from retex_cli.offsets.total import Noise, cheapest_total
from retex_cli.offsets.trainable import Kept, Trainable

TOLERANCE = 0.985
"""A fit stops looking once it uses at least this share of its budget (and never more than all of it)."""
FOLDED = 0.04
"""Of the fp32 bytes: with less, BatchNorm's four vectors are coded as two."""
COMPONENT_BITS = 6.0
"""What a kept component costs beside its entries: its level and its scale, entropy coded."""
USUAL_BITS, FEWEST = 1.6, 4
"""Bits an entry that most kept components end at, and components that are looked for in any tensor."""
AMPLE = 1.25
"""Share of the budget at which more components are looked for than were found."""
MEASURED = 8
"""Leading long vectors on which the curve of a tensor is measured."""
LEAD = 0.2
"""Kept components stand for those that are left out: the offset of a tensor of whose energy a share r is kept is
multiplied by ``r ** -LEAD``. Fine-tuning moves all components the same way as far as a network's answers go, so what
is left out is not noise around what is kept but less of the same."""

Prepared = tuple[Components | Tensor, Candidates]
"""A decomposed offset (or a vector as it is) and what keeping its parts would cost and gain."""


@dataclass(frozen=True)
class _Aim:
    """The offset of one tensor, and what it becomes when another's has been coded, if it follows one."""

    prepared: Prepared
    pivot: Pivot | None


Levels = list[list[int]]
"""The level of every kept component, by tensor in the order of the layout."""


class BudgetTooSmall(ValueError):
    """Not even one component fits; ``minimum`` is the number of bytes that would do."""

    def __init__(self, minimum: int) -> None:
        super().__init__(f"at least {minimum} bytes are needed")
        self.minimum = minimum


class OffsetFitter:
    """Grows tensor by tensor, then turns into bytes: ``update`` for every shared tensor, ``finish`` once.

    ``layout`` is every shared tensor's (name, shape) in sorted order; ``budget`` the bytes that ``finish`` may use;
    ``weights`` by how much a squared error in a tensor counts for more than in others, 1 by default. ``lead``: see
    ``LEAD``; 0 leaves the least squared error.
    """

    def __init__(
        self,
        layout: Sequence[tuple[str, Shape]],
        budget: int,
        weights: Mapping[str, float] | None = None,
        lead: float = LEAD,
    ) -> None:
        self._layout = list(layout)
        self._lead = lead
        self.budget = budget
        self.weights = dict(weights or {})
        self._aims: dict[str, _Aim] = {}
        self._folded: dict[str, _Aim] = {}
        self.nbytes = 4 * sum(math.prod(shape) for _, shape in layout)  # of the whole layout, fp32
        self._unfolded = FOLDED * self.nbytes

    def prepare(self, delta: Tensor, rank: int | None = None) -> Prepared:
        """The part of ``update`` that takes time and touches nothing shared, so threads may run it side by side.

        ``delta`` is the offset ``expert - merged`` of one tensor, float32, on any device. ``rank``: how many components
        to look for; by default what its share of the budget, by its size, is likely to pay for. See ``short``.
        """
        if delta.ndim < 2:
            vector = delta.reshape(-1).cpu()
            return vector, _vector_candidates(vector)
        components = decompose(as_matrix(delta), rank or self.first_rank(tuple(delta.shape)))
        return components, _component_candidates(components)

    def update(self, name: str, prepared: Prepared, pivot: Pivot | None = None) -> None:
        """Takes what ``prepare`` made of the offset of tensor ``name``, perhaps in the place of fewer components.

        ``pivot``: what it becomes when another tensor's has been coded.
        """
        what, candidates = prepared
        before = self._aims.get(name)
        if before is not None and len(candidates.energies) <= len(before.prepared[1].energies):
            prepared = what, replace(candidates, rest=0.0)  # there are no more to be found
        self._aims[name] = _Aim(prepared, pivot)
        self._folded.pop(name, None)

    def fold(self, name: str, prepared: Prepared, pivot: Pivot | None = None) -> None:
        """Takes another offset of ``name``, for budgets too small for its own: see ``batchnorm``."""
        self._folded[name] = _Aim(prepared, pivot)

    def _aim(self, name: str) -> _Aim:
        folded = self._folded.get(name) if self.budget < self._unfolded else None
        return folded or self._aims[name]

    def _of(self, name: str) -> Prepared:
        return self._aim(name).prepared

    @property
    def pivots(self) -> dict[str, Pivot]:
        """By name, of tensors whose offset follows that of another at this budget."""
        found = {name: self._aim(name).pivot for name in self._aims}
        return {name: pivot for name, pivot in found.items() if pivot is not None}

    def first_rank(self, shape: Shape) -> int:
        """How many components of a tensor to look for at first, 0 of a vector: twice what a share of the budget in
        proportion to its size pays for, and never more than the whole budget would pay for, at half a bit an entry of
        the longer side."""
        if len(shape) < 2:
            return 0
        size = sum(math.prod(other) for _, other in self._layout)
        share = 8 * self.budget * math.prod(shape) / max(size, 1)
        likely = math.ceil(2 * share / (USUAL_BITS * max(sum(stream.sides(shape)), 1))) + FEWEST
        return min(likely, int(8 * self.budget / (max(shape[0], 1) / 2)) + 1)

    def short(self) -> dict[str, int]:
        """Tensors of which too few components were looked for, and how many to look for next: with somewhat more than
        the budget, all that were found would be kept. As energies fall, components beyond one that is not worth its
        bits are not, either: once nothing is short the allocation is that of full decompositions."""
        candidates = self.candidates()
        found = allocate(candidates, AMPLE * 8 * self.budget)
        return {
            name: math.ceil(1.5 * len(chosen)) + FEWEST
            for (name, _), candidate, chosen in zip(self._layout, candidates, found, strict=True)
            if candidate.rest > 0 and 0 < len(chosen) == len(candidate.energies)
        }

    def candidates(self) -> list[Candidates]:
        """What could be kept of every tensor of the layout, in its order."""
        return [self._candidates(name) for name, _ in self._layout]

    def lower_budget(self, noises: Mapping[str, Noise]) -> None:
        """Lower the budget to where offsets and exact correction are smallest together; ``noises`` by tensor name."""
        nothing = Noise(0, 1.0)
        self.budget = cheapest_total(
            self.candidates(), [noises.get(name, nothing) for name, _ in self._layout], self.budget
        )

    def finish(self) -> bytes:
        """The coded offsets: at most the budget, and near it unless everything fits in less.

        Raises ``BudgetTooSmall`` when nothing useful fits.
        """
        return self._within(self.budget)[1]

    def components(self) -> dict[str, Kept]:
        """What ``finish`` keeps, as it is before it is coded, by tensor name. Raises ``BudgetTooSmall``."""
        return self._kept(self._within(self.budget)[0])

    def left_out(self, kept: Mapping[str, Kept], weights: Mapping[str, float]) -> float:
        """The share of all energy that is expected to be missing with ``kept``, where that of tensors counts so."""
        missing = whole = 0.0
        for name in self._aims:
            candidate, weight = self._of(name)[1], weights.get(name, 1.0)
            levels = kept[name].levels if name in kept else ()
            left = candidate.energies.copy()
            left[: len(levels)] *= 1 - candidate.kept[np.array(levels, dtype=np.int64)]
            missing += weight * (float(left.sum()) + candidate.rest)
            whole += weight * (float(candidate.energies.sum()) + candidate.rest)
        return missing / whole if whole else 0.0

    def _within(self, budget: int) -> tuple[Levels, bytes]:
        candidates = self.candidates()
        best, best_levels = b"", self._none()
        if not any((candidate.energies > 0).any() for candidate in candidates):
            return best_levels, self.encode({})
        target, highest, lowest = 8.0 * budget, math.inf, 0.0
        for _ in range(12):
            levels = allocate(candidates, target)
            if levels == best_levels:
                break
            data = self.encode(self._kept(levels)) if any(levels) else b""
            if data and len(data) <= budget:
                lowest = target
                if len(data) > len(best):
                    best, best_levels = data, levels
                if len(data) >= TOLERANCE * budget:
                    break
            elif data:
                highest = target
            guess = target * 0.995 * budget / max(len(data), 1)
            target = guess if lowest < guess < highest else (lowest + min(highest, 2 * target)) / 2
        if best:
            return best_levels, best
        levels = self._fewest(candidates)
        data = self.encode(self._kept(levels))
        if len(data) > budget:
            raise BudgetTooSmall(len(data))
        return levels, data

    def least(self) -> int:
        """Bytes of the smallest coded offsets that hold anything."""
        candidates = self.candidates()
        some = any((candidate.energies > 0).any() for candidate in candidates)
        return len(self.encode(self._kept(self._fewest(candidates) if some else self._none())))

    def _none(self) -> Levels:
        """Of an expert that is the merged checkpoint."""
        return [[] for _ in self._layout]

    def _fewest(self, candidates: list[Candidates]) -> Levels:
        """The one component that takes the fewest bytes."""
        prices = [float(c.bits[c.hull[0]]) if (c.energies > 0).any() else math.inf for c in candidates]
        cheapest = prices.index(min(prices))
        levels = self._none()
        [levels[cheapest]] = allocate([candidates[cheapest]], prices[cheapest])
        return levels

    def _candidates(self, name: str) -> Candidates:
        if name not in self._aims:
            return Candidates(np.zeros(0), np.zeros(0), np.zeros(0))
        candidates = self._of(name)[1]
        return replace(candidates, energies=candidates.energies * self.weights.get(name, 1.0))

    def _kept(self, levels: Levels) -> dict[str, Kept]:
        """The components that ``levels`` keep, their left vectors fitted to the decoded right ones."""
        named = {name: tuple(chosen) for (name, _), chosen in zip(self._layout, levels, strict=True) if chosen}
        rights = _Quantised()
        for name, chosen in named.items():
            components = self._of(name)[0]
            if isinstance(components, Components):
                unit = math.sqrt(components.right.shape[1])
                for row, level in zip(components.right, chosen, strict=False):
                    _, context = stream.contexts(level, len(components.left), len(row))
                    rights.add(name, context, row * unit)
        found = {}
        for name, chosen in named.items():
            components = self._of(name)[0]
            if isinstance(components, Components):
                unit = math.sqrt(components.right.shape[1])
                right = torch.stack(rights.decoded(name)) / unit
                left = _refit(components, right)
                left *= _kept_share(components, left, right) ** -self._lead
                found[name] = Kept(left, components.right[: len(chosen)] * unit, chosen)
            else:
                found[name] = Kept(components[:, None], None, chosen)
        return found | self._following(found)

    def _following(self, kept: Mapping[str, Kept]) -> dict[str, Kept]:
        """Those of ``kept`` that follow another tensor's offset, as that is coded."""
        pivots = {name: pivot for name, pivot in self.pivots.items() if name in kept}
        theirs = {pivot.variance for pivot in pivots.values()}
        coded = Trainable({name: kept[name] for name in kept if name in pivots or name in theirs}, pivots).kept()
        return {name: coded[name] for name in pivots}

    def encode(self, kept: Mapping[str, Kept]) -> bytes:
        """Bytes of components as they are given, whatever the budget."""
        rights, lefts = _Quantised(), _Quantised()
        scales: dict[str, list[int]] = {}
        for name, components in kept.items():
            columns, rows = components.left.T, components.right
            scales[name] = [stream.scale_code(max(float(c.square().mean().sqrt()), 1e-30)) for c in columns]
            for i, (column, scale, level) in enumerate(zip(columns, scales[name], components.levels, strict=True)):
                left, right = stream.contexts(level, len(column), 0 if rows is None else rows.shape[1])
                lefts.add(name, left, column / stream.scale_value(scale))
                if rows is not None:
                    rights.add(name, right, rows[i])
        coded = []
        for name, _ in self._layout:
            chosen = kept[name].levels if name in kept else ()
            left_symbols = lefts.symbols.get(name, [])
            right_symbols: Sequence[Tensor | None] = rights.symbols.get(name) or [None] * len(chosen)
            coded.append(
                [Coded(*parts) for parts in zip(chosen, scales.get(name, []), left_symbols, right_symbols, strict=True)]
            )
        return stream.encode(coded, {**rights.shifts(), **lefts.shifts()})

    def encode_within(self, kept: Mapping[str, Kept]) -> bytes:
        """``encode``, without the components of the least weight where the budget does not hold them all."""
        data = self.encode(kept)
        weakest = sorted(
            (self.weights.get(name, 1.0) * energy / bits, name, index)
            for name, components in kept.items()
            for index, (energy, bits) in enumerate(components.worth())
        )
        dropped = 0
        while len(data) > self.budget and dropped < len(weakest):
            dropped += max(dropped // 4, 1)
            gone = {(name, index) for _, name, index in weakest[:dropped]}
            data = self.encode({name: c for name in kept if (c := kept[name].without(gone, name)) is not None})
        return data


def _refit(components: Components, right: Tensor) -> Tensor:
    """Least squares: the left vectors [m, k] that fit the offset best with the decoded right vectors [k, n]."""
    gram = (right @ right.T).double()
    ridge = 1e-6 * float(gram.diagonal().mean()) * torch.eye(len(right), dtype=torch.float64)
    mixing = torch.linalg.solve(gram + ridge, (right @ components.right.T).double()).float()  # [kept, all]
    left: Tensor = (components.left * components.values) @ mixing.T
    return left


def _kept_share(components: Components, left: Tensor, right: Tensor) -> float:
    """The squared norm of ``left @ right``, over that of the offset; at most 1."""
    kept = float(((left.T @ left).double() * (right @ right.T).double()).sum())
    whole = float(components.values.double().square().sum()) + components.missed
    return min(kept / whole, 1.0) if kept > 0 else 1.0


class _Quantised:
    """Vectors and their symbols by tensor, with the shifts of every context over all tensors."""

    def __init__(self) -> None:
        self.symbols: dict[str, list[Tensor]] = {}
        self._contexts: dict[str, list[Context]] = {}
        self._pools: dict[Context, list[tuple[Tensor, Tensor]]] = {}
        self._shifts: dict[Context, list[int]] | None = None

    def add(self, name: str, context: Context, vector: Tensor) -> None:
        """One more vector of tensor ``name``, of unit variance."""
        symbols = quantise(vector, context[0])
        self.symbols.setdefault(name, []).append(symbols)
        self._contexts.setdefault(name, []).append(context)
        self._pools.setdefault(context, []).append((vector, symbols))
        self._shifts = None

    def shifts(self) -> dict[Context, list[int]]:
        """See ``quantiser.centroid_shifts``; complete once everything is added."""
        if self._shifts is None:
            self._shifts = {
                context: centroid_shifts(torch.cat([v for v, _ in pool]), torch.cat([s for _, s in pool]), context[0])
                for context, pool in self._pools.items()
            }
        return self._shifts

    def decoded(self, name: str) -> list[Tensor]:
        """What the decoder will make of the vectors of a tensor."""
        shifts = self.shifts()
        return [
            dequantise(symbols, context[0], shifts[context])
            for symbols, context in zip(self.symbols[name], self._contexts[name], strict=True)
        ]


def _vector_candidates(vector: Tensor) -> Candidates:
    energy = float(vector.double().square().sum())
    return Candidates(
        np.array([energy] if energy > 0 else []),
        1 - NORMAL.distortions[:LEVELS],
        COMPONENT_BITS + vector.numel() * NORMAL.rates[:LEVELS],
    )


def _component_candidates(components: Components) -> Candidates:
    """Two vectors with relative errors D and E keep (1 - D) (1 - E) of the energy of their outer product."""
    left, right = len(components.left), components.right.shape[1]
    curves = [_curve(components.left.T, left), _curve(components.right, right)]
    kept, bits = np.ones(LEVELS), np.full(LEVELS, COMPONENT_BITS)
    for curve, length, shift in zip(curves, (left, right), stream.finer(left, right), strict=True):
        levels = np.minimum(np.arange(LEVELS) + shift, len(curve.rates) - 1)
        kept *= 1 - curve.distortions[levels]
        bits += length * curve.rates[levels]
    return Candidates(components.values.double().square().cpu().numpy(), kept, bits, components.missed)


def _curve(vectors: Tensor, length: int) -> Curve:
    if length < LONG or not len(vectors):
        return NORMAL
    return measure(vectors[:MEASURED] * math.sqrt(length))
