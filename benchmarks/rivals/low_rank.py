"""Low rank: truncated SVD of the offsets, LoRA extraction, TSV-Compress."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rivals.form import Tensors
from rivals.pack import Pack, Unpack

Rank = Callable[[int, int], int]
"""Components that are kept of an ``m x n`` matrix."""


def fixed(rank: int) -> Rank:
    """The same for every matrix; truncated SVD (Eckart and Young) and mergekit's ``mergekit-extract-lora``."""
    return lambda m, n: min(rank, m, n)


def share(part: float) -> Rank:
    """TSV-Compress, arXiv 2412.00081, section 4.1: a share of all components, ``1 / T`` in the paper; at least one."""
    return lambda m, n: max(1, round(min(m, n) * part))


def encode(reference: Tensors, expert: Tensors, rank: Rank, *, vectors: bool) -> bytes:
    """Factors of the offsets from ``reference`` in float16, each with the root of the singular values.

    Where factors would be no smaller, the offset itself. Tensors of fewer than two dimensions in float16 with
    ``vectors``, else left as they are in the reference (LoRA extraction takes matrices only).
    """
    pack = Pack()
    matrices = [as_matrix(tensor) for tensor in reference.values() if tensor.ndim > 1]
    pack.shorts([int(vectors), *(rank(*matrix.shape) for matrix in matrices)])
    for name, tensor in reference.items():
        delta = expert[name] - tensor
        if delta.ndim > 1:
            write_matrix(pack, as_matrix(delta), rank(*as_matrix(delta).shape))
        elif vectors:
            pack.halves(delta)
    return pack.data()


def decode(reference: Tensors, data: bytes) -> dict[str, Tensor]:
    """The expert as ``encode`` left it."""
    unpack = Unpack(data)
    vectors, *ranks = unpack.shorts(1 + sum(tensor.ndim > 1 for tensor in reference.values()))
    left = iter(ranks)
    found = {}
    for name, tensor in reference.items():
        if tensor.ndim > 1:
            found[name] = tensor + read_matrix(unpack, as_matrix(tensor).shape, next(left)).reshape(tensor.shape)
        else:
            found[name] = tensor + unpack.halves(*tensor.shape) if vectors else tensor
    return found


def as_matrix(tensor: Tensor) -> Tensor:
    """``d_out x rest``."""
    return tensor.flatten(1)


def write_matrix(pack: Pack, matrix: Tensor, rank: int) -> None:
    """Two factors of ``matrix [m, n]``, or all of it where they would be no smaller."""
    m, n = matrix.shape
    if not pays(rank, m, n):
        pack.halves(matrix)
        return
    left, values, right = truncated(matrix, rank)
    root = values.sqrt()
    pack.halves(left * root)
    pack.halves(root[:, None] * right)


def read_matrix(unpack: Unpack, shape: tuple[int, ...], rank: int) -> Tensor:
    """``[m, n]``, as ``write_matrix`` left it."""
    m, n = shape
    return unpack.halves(m, rank) @ unpack.halves(rank, n) if pays(rank, m, n) else unpack.halves(m, n)


def pays(rank: int, m: int, n: int) -> bool:
    """Whether factors hold fewer numbers than the matrix."""
    return rank * (m + n) < m * n


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """``U [m, rank]``, ``s [rank]``, ``V^T [rank, n]`` of float ``[m, n]``; zeros beyond its own rank: float32.

    By the eigenvectors of the smaller Gram matrix, in float64.
    """
    if matrix.shape[0] < matrix.shape[1]:
        left, values, right = truncated(matrix.T, rank)
        return right.T, values, left.T
    double = matrix.double()
    energies, vectors = torch.linalg.eigh(double.T @ double)
    values, right = energies.flip(0)[:rank].clamp(min=0).sqrt(), vectors.flip(1)[:, :rank]
    there = values > 1e-7 * values[:1]
    left = torch.where(there, (double @ right) / values.clamp(min=1e-300), 0)
    return left.float(), (values * there).float(), right.T.float().contiguous()
