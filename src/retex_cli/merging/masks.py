"""Random masks that depend on (seed, tensor, task, element) and on nothing else: not on blocks, order or threads.

Each element's index goes through an integer hash keyed by SHA-256 of (seed, task, tensor); its 31 bits, compared with
the share to keep, decide. Integer arithmetic only: every device gives the same masks.

The hash is two rounds of xor-shift and multiply. Shifts are arithmetic, as torch's are, so that the sign bit is lost
in each round; it is kept out of the index, and what is left, the lower 31 bits of the product, is exactly uniform.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)
"""Odd multipliers with good avalanche."""
_HIGH = 0x1E3779B1
"""Spreads the upper half of the index of a tensor with 2**31 elements or more."""
_LOW_BITS = 0x7FFFFFFF


def keys(seed: int, name: str, tasks: Sequence[str]) -> Tensor:
    """An int32 key of 31 bits per task, ``[T]``, for the masks of tensor ``name``."""
    digests = [hashlib.sha256(f"{seed}\0{task}\0{name}".encode()).digest() for task in tasks]
    numbers = [int.from_bytes(digest[:4], "little") & _LOW_BITS for digest in digests]
    return torch.tensor(numbers, dtype=torch.int32)


def element_words(start: int, length: int, device: torch.device) -> Tensor:
    """One int32 word of 31 bits per element from ``start`` on: its index, the upper half mixed into the lower."""
    index = torch.arange(start, start + length, device=device)
    if start + length > _LOW_BITS:
        index = (index ^ (index >> 31) * _HIGH) & _LOW_BITS
    return index.to(torch.int32)


def hash_into(bits: Tensor, scratch: Tensor, words: Tensor, key: Tensor) -> Tensor:
    """31 hashed bits, int32 in ``0 .. 2**31``, of each of ``words [n]``, into ``bits``; ``scratch`` is overwritten."""
    torch.bitwise_xor(words, key, out=bits)
    bits.bitwise_xor_(torch.bitwise_right_shift(bits, 16, out=scratch)).mul_(_FIRST)
    bits.bitwise_xor_(torch.bitwise_right_shift(bits, 15, out=scratch)).mul_(_SECOND)
    return bits.bitwise_and_(_LOW_BITS)


def hashed(key: Tensor, start: int, length: int) -> Tensor:
    """The hashed bits of all tasks, int32 ``[T, length]``, for the elements from ``start`` on."""
    words = element_words(start, length, key.device)
    bits = words.new_empty(len(key), length)
    return hash_into(bits, torch.empty_like(bits), words, key[:, None])


def drop_(values: Tensor, densities: Sequence[float], key: Tensor, start: int) -> Tensor:
    """Zero each entry of float32 ``values [T, n]`` (elements from ``start``) with probability 1 - its task's density.

    Task by task, so that all that is touched stays in the second-level cache.
    """
    if min(densities) >= 1:
        return values
    words = element_words(start, values.shape[1], values.device)
    bits, scratch = torch.empty_like(words), torch.empty_like(words)
    for row, one, density in zip(values.view(torch.int32).unbind(0), key.unbind(0), densities, strict=True):
        if density >= 1:
            continue
        bound = min(round(density * 2**31), _LOW_BITS)
        hash_into(bits, scratch, words, one)
        # hash - bound is negative exactly where the entry is kept; its sign, spread over the word, is the mask.
        row.bitwise_and_(bits.sub_(bound).bitwise_right_shift_(31))
    return values
