"""Singular value decomposition of one offset, by the eigenvectors of its smaller Gram matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Components:
    """The leading singular triplets of an offset seen as a matrix: ``left @ diag(values) @ right``.

    ``left`` float32 [m, k] with unit columns, ``values`` float32 [k] descending, ``right`` float32 [k, n] with unit
    rows.
    """

    left: Tensor
    values: Tensor
    right: Tensor


def as_matrix(delta: Tensor) -> Tensor:
    """``delta`` as ``d_out x rest``: convolutions lose their window, vectors and scalars become one column."""
    return delta.flatten(1) if delta.ndim >= 2 else delta.reshape(-1, 1)


def decompose(matrix: Tensor, max_rank: int) -> Components:
    """At most ``max_rank`` leading components of ``matrix`` (float32 [m, n]), zero ones left out.

    The Gram matrix is formed and diagonalised in float64: squaring costs half the digits, and half of them is still
    more than the float32 input has.
    """
    if not matrix.numel():
        return Components(
            matrix.new_zeros(matrix.shape[0], 0), matrix.new_zeros(0), matrix.new_zeros(0, matrix.shape[1])
        )
    wide = matrix.shape[0] < matrix.shape[1]
    double = matrix.double()
    gram = double @ double.T if wide else double.T @ double
    eigenvalues, vectors = torch.linalg.eigh(gram)
    values = eigenvalues.flip(0).clamp_min(0).sqrt()
    rank = min(max_rank, int((values > 1e-7 * values[:1].clamp_min(1e-30)).sum()))
    values, basis = values[:rank], vectors.flip(1)[:, :rank].float()
    scale = values.float()
    if wide:
        return Components(basis, scale, (basis.T @ matrix) / scale[:, None])
    return Components((matrix @ basis) / scale, scale, basis.T.contiguous())
