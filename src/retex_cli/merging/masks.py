"""Random masks that depend on (seed, tensor, task, element) and on nothing else: not on blocks, order or threads.

Element e of a tensor owns the e-th 16 bits of a Philox stream (Salmon et al. 2011, a counter-based generator, as numpy
has it) whose key is SHA-256 of (seed, task, tensor): any part of the stream can be drawn alone. Compared with the share
to keep they decide, so shares are met to the nearest 2**-16. They are drawn on the CPU: every device gets these masks.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DRAWS = 1 << 16
"""Number of values that a draw takes, all equally likely."""
_STEP = 16
"""Draws per step of the generator's counter, which gives four words of 64 bits."""
_LOW_WORD = (1 << 64) - 1


def keys(seed: int, name: str, tasks: Sequence[str]) -> tuple[int, ...]:
    """A key of 128 bits per task for the masks of tensor ``name``."""
    digests = [hashlib.sha256(f"{seed}\0{task}\0{name}".encode()).digest() for task in tasks]
    return tuple(int.from_bytes(digest[:16], "little") for digest in digests)


def draws(key: Sequence[int], start: int, length: int) -> NDArray[np.uint16]:
    """What chance gave each task's elements from ``start`` on: ``[T, length]``, uniform in ``0 .. DRAWS - 1``."""
    step, offset = divmod(start, _STEP)
    words = -(-(offset + length) // 4)
    found = np.empty((len(key), length), np.uint16)
    for row, one in zip(found, key, strict=True):
        drawn = _stream.at(one, step).random_raw(words)
        row[:] = drawn.astype("<u8", copy=False).view("<u2")[offset : offset + length]
    return found


class _Stream(threading.local):
    """One generator per thread, moved to where it is needed: making one takes as long as drawing from it."""

    def __init__(self) -> None:
        self.philox = np.random.Philox(0)
        self.state = self.philox.state
        self.state["buffer_pos"] = 4  # what is buffered is used up

    def at(self, key: int, step: int) -> np.random.Philox:
        """The generator with this key of 128 bits, about to draw what belongs to the counter's ``step``."""
        self.state["state"]["counter"][0] = step
        self.state["state"]["key"][:] = key & _LOW_WORD, key >> 64
        self.philox.state = self.state
        return self.philox


_stream = _Stream()


def drop_(values: Tensor, densities: Sequence[float], key: Sequence[int], start: int) -> Tensor:
    """Zero each entry of float32 ``values [T, n]`` (elements from ``start``) but for its task's density of them."""
    if min(densities) >= 1:
        return values
    last = [min(max(round(density * DRAWS), 1), DRAWS) - 1 for density in densities]
    return _keep_(values, draws(key, start, values.shape[1]) <= np.array(last, np.uint16)[:, None])


def drop_each_(values: Tensor, chances: Tensor, key: Sequence[int], start: int) -> Tensor:
    """Zero each entry of float32 ``values [T, n]`` unless its draw is below its own chance, ``chances [T, n]``."""
    last = (chances * DRAWS).round_().clamp_(1, DRAWS).sub_(1)
    return _keep_(values, draws(key, start, values.shape[1]) <= last.cpu().numpy().astype(np.uint16))


def _keep_(values: Tensor, kept: NDArray[np.bool_]) -> Tensor:
    """Multiply ``values [T, n]`` by what is kept, in place (numpy converts in small pieces, torch all at once)."""
    if values.device.type == "cpu":
        np.multiply(values.numpy(), kept, out=values.numpy())
        return values
    return values.mul_(torch.from_numpy(kept).to(values.device))
