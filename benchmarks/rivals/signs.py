"""BitDelta: the sign of every entry of an offset, and one scale."""

from __future__ import annotations

import torch
from torch import Tensor

from rivals.form import Tensors
from rivals.pack import Pack, Unpack


def encode(merged: Tensors, expert: Tensors) -> bytes:
    """arXiv 2402.10193, equations 1 to 3: ``delta ~ alpha sign(delta)`` with ``alpha = mean |delta|``, per matrix.

    The paper then trains the scales on the expert's logits; this is the form before that. Tensors of fewer than two
    dimensions in float16; embeddings, which the paper leaves as they are, by their signs too.
    """
    pack = Pack()
    for name, tensor in merged.items():
        delta = expert[name] - tensor
        if delta.ndim > 1:
            pack.singles(float(delta.abs().mean()))
            pack.symbols(delta > 0)
        else:
            pack.halves(delta)
    return pack.data()


def decode(merged: Tensors, data: bytes) -> dict[str, Tensor]:
    """The expert as ``encode`` left it."""
    unpack = Unpack(data)
    found = {}
    for name, tensor in merged.items():
        if tensor.ndim > 1:
            (scale,) = unpack.singles(1)
            signs = unpack.symbols(*tensor.shape).to(torch.float32).mul_(2).sub_(1)
            found[name] = tensor + scale * signs
        else:
            found[name] = tensor + unpack.halves(*tensor.shape)
    return found
