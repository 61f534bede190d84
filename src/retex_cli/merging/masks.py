"""Random masks that depend on (seed, tensor, task, element) and on nothing else: not on blocks, order or threads.

Each element's index goes through an integer hash keyed by SHA-256 of (seed, task, tensor); its upper 31 bits, where a
product mixes best, are compared with the share to keep. Integer arithmetic only: every device gives the same masks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)
"""Odd multipliers with good avalanche for two rounds of xor-shift and multiply on 32 bits."""
_THIRD = 0x9E3779B1
"""Spreads the upper word of the index of a tensor with more than 2**32 elements."""
_WORD = 1 << 32


def keys(seed: int, name: str, tasks: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Two int32 keys ``[T, 1]`` for the tasks' masks of tensor ``name``."""
    pairs = []
    for task in tasks:
        digest = hashlib.sha256(f"{seed}\0{task}\0{name}".encode()).digest()
        pairs.append([int.from_bytes(digest[i : i + 4], "little", signed=True) for i in (0, 4)])
    both = torch.tensor(pairs, dtype=torch.int32).view(len(tasks), 2)
    return both[:, :1], both[:, 1:]


def _xor_shift(bits: Tensor, shift: int, scratch: Tensor) -> None:
    """``bits ^= bits >>> shift`` on unsigned words that torch holds as signed."""
    torch.bitwise_right_shift(bits, shift, out=scratch)
    bits.bitwise_xor_(scratch.bitwise_and_((1 << (32 - shift)) - 1))


def hashed(first: Tensor, second: Tensor, start: int, length: int) -> tuple[Tensor, Tensor]:
    """31 hashed bits, int32 ``[T, length]`` in ``0 .. 2**31``, for the elements from ``start`` on; and scratch."""
    index = torch.arange(start, start + length, device=first.device)
    words = index.to(torch.int32)
    if start + length > _WORD:
        words.bitwise_xor_((index >> 32).mul_(_THIRD).to(torch.int32))
    bits = torch.bitwise_xor(words, first)
    scratch = torch.empty_like(bits)
    _xor_shift(bits, 16, scratch)
    bits.mul_(_FIRST).bitwise_xor_(second)
    _xor_shift(bits, 15, scratch)
    bits.mul_(_SECOND).bitwise_right_shift_(1).bitwise_and_(0x7FFFFFFF)
    return bits, scratch


def drop_(values: Tensor, density: float, first: Tensor, second: Tensor, start: int) -> Tensor:
    """Zero each entry of float32 ``values [T, n]`` (elements from ``start``) with probability ``1 - density``."""
    if density >= 1:
        return values
    bits, scratch = hashed(first, second, start, values.shape[1])
    # hash - bound is negative exactly where the entry is kept; its sign, spread over the word, is the mask.
    torch.bitwise_right_shift(bits.sub_(min(round(density * 2**31), 2**31 - 1)), 31, out=scratch)
    values.view(torch.int32).bitwise_and_(scratch)
    return values
