"""Offsets of which most entries are dropped at random: DARE, and 4 bits for what is left in the style of UltraDelta."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rivals.form import Tensors
from rivals.pack import Pack, Unpack

LEVELS = 16


def dare(merged: Tensors, expert: Tensors, drop: float, *, seeded: bool, seed: int = 0) -> bytes:
    """arXiv 2311.03099, section 3: every entry is dropped with probability ``drop``, the others count ``1/(1-drop)``.

    Matrices only, the rest in float16. What is left is kept in float16, where it was as an entropy-coded mask or, with
    ``seeded``, as nothing but the seed of the generator: no form of the method is smaller.
    """
    pack = Pack()
    pack.singles(drop)
    pack.shorts([int(seeded), seed])
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in merged.items():
        delta = expert[name] - tensor
        if delta.ndim > 1:
            kept = torch.rand(delta.shape, generator=generator) >= drop
            if not seeded:
                pack.symbols(kept)
            pack.halves(delta[kept])
        else:
            pack.halves(delta)
    return pack.data()


def dare_decode(merged: Tensors, data: bytes) -> dict[str, Tensor]:
    """The expert as ``dare`` left it."""
    unpack = Unpack(data)
    (drop,) = unpack.singles(1)
    seeded, seed = unpack.shorts(2)
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in merged.items():
        if tensor.ndim > 1:
            kept = (
                torch.rand(tensor.shape, generator=generator) >= drop if seeded else unpack.symbols(*tensor.shape) > 0
            )
            delta = torch.zeros_like(tensor)
            delta[kept] = unpack.halves(int(kept.sum())) / (1 - drop)
        else:
            delta = unpack.halves(*tensor.shape)
        found[name] = tensor + delta
    return found


def ultra(merged: Tensors, expert: Tensors, drop: float, *, rescale: float = 1.0, seed: int = 0) -> bytes:
    """In the style of UltraDelta (arXiv 2505.13563), section 3: sparsity by variance, 4 bits, a drop level by level.

    Of the matrices in the order of their spread the lower third of all entries is dropped more, the upper third less;
    each is quantised to 16 levels between its extremes; of the entries of every level the same share is dropped; what
    is left counts ``rescale / (1 - drop)``. The paper's factor ``rescale`` is chosen by the trace norm, here it is 1.
    Symbols (16 levels and "dropped") are entropy-coded; tensors of fewer than two dimensions in float16.
    """
    generator = torch.Generator().manual_seed(seed)
    deltas = {name: expert[name] - tensor for name, tensor in merged.items()}
    drops = spread_drops({name: delta for name, delta in deltas.items() if delta.ndim > 1}, drop)
    pack = Pack()
    pack.singles(rescale / (1 - drop) if drop < 1 else 0.0)
    for name, delta in deltas.items():
        if delta.ndim < 2:
            pack.halves(delta)
            continue
        low, high = (float(edge) for edge in delta.aminmax())
        step = (high - low) / (LEVELS - 1)
        levels = ((delta - low) / step).round().to(torch.int64) if step else torch.zeros_like(delta, dtype=torch.int64)
        pack.singles(low, step)
        pack.symbols(torch.where(_kept(levels.flatten(), drops[name], generator), levels.flatten() + 1, 0))
    return pack.data()


def ultra_decode(merged: Tensors, data: bytes) -> dict[str, Tensor]:
    """The expert as ``ultra`` left it."""
    unpack = Unpack(data)
    (factor,) = unpack.singles(1)
    found = {}
    for name, tensor in merged.items():
        if tensor.ndim > 1:
            low, step = unpack.singles(2)
            symbols = unpack.symbols(*tensor.shape)
            delta = torch.where(symbols > 0, low + step * (symbols - 1), 0.0) * factor
        else:
            delta = unpack.halves(*tensor.shape)
        found[name] = tensor + delta
    return found


def spread_drops(deltas: Tensors, drop: float) -> dict[str, float]:
    """The share that each matrix loses, those that spread least the most; all together lose the share ``drop``."""
    step = min(drop, 1 - drop) / 2
    order = sorted(deltas, key=lambda name: float(deltas[name].std()))
    total = sum(delta.numel() for delta in deltas.values())
    before, rates, lost = 0, {}, 0.0
    for name in order:
        before += deltas[name].numel()
        if before <= 2 * total / 3:
            rates[name] = drop + step if before <= total / 3 else drop
            lost += rates[name] * deltas[name].numel()
    wide = [name for name in order if name not in rates]
    rest = sum(deltas[name].numel() for name in wide)
    return {**rates, **dict.fromkeys(wide, min(max((drop * total - lost) / rest, 0.0), 1.0) if rest else drop)}


def _kept(levels: Tensor, drop: float, generator: torch.Generator) -> Tensor:
    """Which entries stay: of every level the same share, at random."""
    order = torch.randperm(len(levels), generator=generator)
    order = order[levels[order].argsort(stable=True)]
    counts = torch.bincount(levels, minlength=LEVELS).tolist()
    kept = torch.zeros(len(levels), dtype=torch.bool)
    for part in torch.split(order, counts):
        kept[part[math.floor(len(part) * drop + 0.5) :]] = True
    return kept
