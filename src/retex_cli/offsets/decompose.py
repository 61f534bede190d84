"""The leading singular components of one offset: by its smaller Gram matrix, or in a Krylov space where few are wanted.

Block Krylov iteration (Halko, Martinsson and Tropp, arXiv 0909.4061; Musco and Musco, arXiv 1504.05477) multiplies a
block of random vectors by the matrix and its transpose a few times, and takes the best components within all that they
span. What the span misses is known exactly afterwards: ``missed = ||A||_F^2 - ||Q^T A||_F^2``. As ``A^T A`` is the sum
of the Gram matrices of the part in the span and of the rest, the k leading components of the span hold at most
``missed`` less energy than the k best of all, for every k (Ky Fan), and no singular value is larger than the root of
``value_i^2 + missed`` (Weyl). On offsets whose spectrum falls the difference is far below a thousandth; on white noise,
where no component is worth more than another, a few percent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SPARE = 8
"""Random vectors beyond the components that are wanted: the last of a block converge last."""
STEPS = 6
"""Most multiplications by ``A A^T``."""
SETTLED = 0.02
"""Iteration ends when a step adds no more than this share to the energy of the wanted components."""

ROUNDING = 1e-11
"""Components with less than this share of the first one's energy are what float32 made of zeros."""


@dataclass(frozen=True)
class Components:
    """The leading singular triplets of an offset seen as a matrix: ``left @ diag(values) @ right``.

    ``left`` float32 [m, k] with unit columns, ``values`` float32 [k] descending, ``right`` float32 [k, n] with unit
    rows. ``missed``: energy (squared entries) of the offset outside of what was searched; 0 where all was.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    missed: float = 0.0


def as_matrix(delta: Tensor) -> Tensor:
    """``delta`` as ``d_out x rest``: convolutions lose their window, vectors and scalars become one column."""
    return delta.flatten(1) if delta.ndim >= 2 else delta.reshape(-1, 1)


def decompose(matrix: Tensor, max_rank: int) -> Components:
    """The ``max_rank`` leading components of ``matrix`` (float32 [m, n]), zero ones left out, and some more where they
    come for nothing. Each call gives the same bits, on one thread."""
    if not matrix.numel():
        return Components(
            matrix.new_zeros(matrix.shape[0], 0), matrix.new_zeros(0), matrix.new_zeros(0, matrix.shape[1])
        )
    if matrix.shape[0] > matrix.shape[1]:
        found = decompose(matrix.T, max_rank)
        return Components(found.right.T.contiguous(), found.values, found.left.T.contiguous(), found.missed)
    block = max_rank + SPARE
    few = (STEPS // 2 + 1) * block <= len(matrix) // 2
    return _in_krylov_space(matrix, max_rank, block) if few else _by_gram_matrix(matrix, 2 * max_rank)


def _by_gram_matrix(matrix: Tensor, max_rank: int) -> Components:
    """Of a wide matrix, from all eigenvectors.

    The Gram matrix is formed and diagonalised in float64: squaring costs half the digits, and half of them is still
    more than the float32 input has.
    """
    double = matrix.double()
    eigenvalues, vectors = torch.linalg.eigh(double @ double.T)
    energies = eigenvalues.flip(0).clamp_min(0)
    values = energies.sqrt()
    rank = min(max_rank, int((values > 1e-7 * values[:1].clamp_min(1e-30)).sum()))
    left, scale = vectors.flip(1)[:, :rank].float(), values[:rank].float()
    whole = rank == len(values) or not float(values[rank]) > 1e-7 * float(values[0])
    missed = 0.0 if whole else float(energies[rank:].sum())
    return Components(left, scale, (left.T @ matrix) / scale[:, None], missed)


def _in_krylov_space(matrix: Tensor, rank: int, block: int) -> Components:
    """Of a wide matrix, from the span of ``(A A^T)^i A`` times one random block."""
    generator = torch.Generator().manual_seed(block)
    start = torch.randn(block, matrix.shape[1], generator=generator).to(matrix.device)
    basis = torch.linalg.qr(matrix @ start.T).Q
    images = basis.T @ matrix  # Q^T A, [span, n]: what the span holds of the matrix; the newest go into the next step
    gram = images.double() @ images.double().T
    newest, before = images, 0.0
    for _ in range(STEPS):
        fresh = matrix @ newest.T
        for _ in range(2):  # once leaves what rounding adds along the old directions
            fresh -= basis @ (basis.T @ fresh)
        fresh = torch.linalg.qr(fresh).Q
        newest = fresh.T @ matrix
        gram = _bordered(gram, images, newest)
        basis, images = torch.cat([basis, fresh], 1), torch.cat([images, newest])
        energy = float(torch.linalg.eigvalsh(gram)[-rank:].sum())
        if energy - before <= SETTLED * energy or 2 * basis.shape[1] > basis.shape[0]:
            break
        before = energy
    eigenvalues, vectors = torch.linalg.eigh(gram)
    energies = eigenvalues.flip(0)[:rank]
    kept = int((energies > ROUNDING * energies[0].clamp_min(1e-60)).sum())
    values, rotation = energies[:kept].sqrt().float(), vectors.flip(1)[:, :kept].float()
    whole = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
    missed = max(whole - float(eigenvalues.sum()), math.ulp(whole)) if kept == rank else 0.0  # zeros are among them
    return Components(basis @ rotation, values, (rotation.T @ images) / values[:, None], missed)


def _bordered(gram: Tensor, images: Tensor, newest: Tensor) -> Tensor:
    """``gram`` (float64) of ``images``, with the rows and columns of ``newest``."""
    fresh = newest.double()
    across = torch.cat(
        [images[start : start + len(fresh)].double() @ fresh.T for start in range(0, len(images), len(fresh))]
    )
    return torch.cat([torch.cat([gram, across], 1), torch.cat([across.T, fresh @ fresh.T], 1)])
