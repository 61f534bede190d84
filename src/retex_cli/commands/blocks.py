"""One tensor of an expert, made block by block: ``recover`` writes what a switched model gets in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from retex_cli.io.provenance import TensorDigest
from retex_cli.offsets.blocks import Span


@dataclass(frozen=True)
class Block:
    """The elements of an expert's tensor from ``at`` on.

    ``make(merged, out)`` gives them flat, in the expert's type: from the elements ``source`` of the merged tensor, flat
    and as stored (none where the task has them of its own); where ``sums`` are made in the expert's type, in ``out`` if
    that is given, which may be ``merged``. Blocks may be made side by side. ``check``, which only exact ones have,
    takes the SHA-256 of the tensor up to the end of this block and raises RetexError where that is not the expert's.
    """

    at: int
    source: Span
    make: Callable[[Tensor, Tensor | None], Tensor]
    check: Callable[[bytes], None] | None = None
    sums: torch.dtype = torch.float32


def take_in(digest: TensorDigest, block: Block, value: Tensor) -> None:
    """The blocks of an exact tensor, one after the other, as they were made. RetexError where they are not exact."""
    digest.update(value)
    if block.check is not None:
        block.check(digest.digest())
