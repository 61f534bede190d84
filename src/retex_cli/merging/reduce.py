"""Sums over a tensor that do not depend on how it was cut into blocks.

Blocks begin on the grid, each cell of the grid is summed by itself in float64, and the cells are added exactly: the
same bits for any block size, order or number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from retex_cli.merging.view import GRID, View

BlockFunction = Callable[[Tensor, Tensor], Tensor]


def exact_sum(parts: Tensor) -> Tensor:
    """The exactly rounded sum of float64 ``parts [m, ...]`` over the first dimension, whatever their order."""
    columns = parts.reshape(len(parts), -1).T.tolist()
    return torch.tensor([math.fsum(column) for column in columns], dtype=torch.float64).view(parts.shape[1:])


def block_sums(view: View, function: BlockFunction) -> Tensor:
    """Sums over all elements of ``function(base [n], experts [T, n]) -> [R, n]``: float64 ``[R]``."""
    return _over_cells(view, function, lambda cell: cell.sum(1))


def products(view: View, function: BlockFunction) -> Tensor:
    """Inner products, over all elements, of the rows of ``function(base, experts) -> [R, n]``: float64 ``[R, R]``."""
    return _over_cells(view, function, lambda cell: cell @ cell.T)


def task_vectors(base: Tensor, experts: Tensor) -> Tensor:
    """``tau [T, n]``, in the experts' memory."""
    return experts.sub_(base)


def _over_cells(view: View, function: BlockFunction, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    parts: Tensor | None = None  # one allocation for all: small results kept between large ones scatter the heap
    for start, base, experts in view.blocks():
        for place, cell in enumerate(torch.split(function(base, experts), GRID, dim=1), start // GRID):
            part = reduce(cell.double())
            if parts is None:
                parts = part.new_empty(-(-view.numel // GRID), *part.shape)
            parts[place] = part
    assert parts is not None, "an empty tensor has no sums"
    return exact_sum(parts)
