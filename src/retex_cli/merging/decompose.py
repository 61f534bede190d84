"""Singular values, subspaces and polar factors in float64, from Gram matrices or thin factors."""

from __future__ import annotations

import torch
from torch import Tensor

RANK_TOLERANCE = 1e-6
"""Singular values below this share of the largest are rounding of float32 weights, not directions."""

STRIP = 192
"""Columns of a Gram matrix that are made in one product."""

SMALL = 160
"""Up to this size a decomposition in float64 is as fast as one in float32."""
RESOLVED, CONVERGED = 1e-4, 1e-6
"""The smallest eigenvalue, relative to the largest, that float32 tells from its neighbours; when to stop correcting."""


def add_gram(total: Tensor, block: Tensor) -> None:
    """Add the upper triangle of ``block^T block`` to ``total [n, n]``, in strips: little more than half the work."""
    for at in range(0, len(total), STRIP):
        total[at : at + STRIP, at:].addmm_(block[:, at : at + STRIP].T, block[:, at:])


def mirror(total: Tensor) -> Tensor:
    """What ``add_gram`` left out, in place: the symmetric matrix ``[n, n]``."""
    for at in range(0, len(total), STRIP):
        total[at + STRIP :, at : at + STRIP] = total[at : at + STRIP, at + STRIP :].T
    return total


def spectrum(gram: Tensor, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Singular values, largest first, and right singular vectors of a matrix with Gram matrix ``[n, n]``.

    ``s [r]`` and ``V [n, r]``; directions below ``RANK_TOLERANCE`` times the ``largest`` are left out. For what is left
    of a matrix after a projection, ``largest`` is a norm of the whole, by which rounding is to be measured.
    """
    values, vectors = torch.linalg.eigh(gram)
    return of_full_rank(values.flip(0), vectors.flip(1), largest)


def of_full_rank(values: Tensor, vectors: Tensor, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvalues of a Gram matrix, largest first, as singular values; without those below ``RANK_TOLERANCE``."""
    values = values.clamp(min=0).sqrt()
    rank = int((values > RANK_TOLERANCE * (values[:1] if largest is None else largest)).sum())
    return values[:rank], vectors[:, :rank]


def leading(gram: Tensor, count: int, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The first ``count`` of ``spectrum``, perhaps turned among themselves where two are equal, in half the time.

    A float32 decomposition, corrected in float64: with approximate eigenvectors ``[V, W]``, the part of ``W`` in the
    wanted subspace is ``W^T (G V - V L) / (l_V - l_W)`` to first order (the rotation of Ogita and Aishima,
    https://doi.org/10.1007/s13160-018-0310-3). Its size is the error that was left, so it proves convergence; where
    eigenvalues lie too close for that, the decomposition is done in float64.
    """
    found = _refined(gram, count) if len(gram) > SMALL and 0 < count < len(gram) else None
    if found is None:
        values, vectors = spectrum(gram, largest)
        return values[:count], vectors[:, :count]
    return of_full_rank(*found, largest)


def _refined(gram: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    scale = gram.diagonal().sum()
    if scale <= 0:
        return None
    approximate, basis = torch.linalg.eigh((gram / scale).float())
    others, rest = approximate[:-count].double() * scale, basis[:, :-count].double()
    vectors = basis[:, -count:].double()
    for _ in range(3):
        vectors = torch.linalg.qr(vectors).Q
        image = gram @ vectors
        values, turn = torch.linalg.eigh(vectors.T @ image)
        vectors, image = vectors @ turn, image @ turn
        if values[0] < RESOLVED * values[-1]:
            return None
        rotation = rest.T @ (image - vectors * values) / (values - others[:, None])
        vectors = vectors + rest @ rotation
        if torch.linalg.matrix_norm(rotation) < CONVERGED:
            return values.flip(0), torch.linalg.qr(vectors.flip(1)).Q
    return None


def thin_svd(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``U [m, k]``, ``s [k]``, ``V [n, k]`` of the product of float64 ``[m, r]`` and ``[r, n]``, never formed."""
    first, second = torch.linalg.qr(left), torch.linalg.qr(right.T)
    u, s, v = torch.linalg.svd(first.R @ second.R.T, full_matrices=False)
    rank = int((s > RANK_TOLERANCE * s[:1]).sum())
    return first.Q @ u[:, :rank], s[:rank], second.Q @ v[:rank].T


def left_vectors(matrix: Tensor, count: int) -> Tensor:
    """The first ``count`` left singular vectors of a float64 ``[m, n]``, fewer if its rank is less: ``[m, count]``."""
    if matrix.shape[0] <= matrix.shape[1]:
        return leading(gram_matrix(matrix.T), count)[1]
    values, vectors = leading(gram_matrix(matrix), count)
    return matrix @ (vectors / values)


def gram_matrix(matrix: Tensor) -> Tensor:
    """``A^T A [n, n]``."""
    total = matrix.new_zeros(matrix.shape[1], matrix.shape[1])
    add_gram(total, matrix)
    return mirror(total)


def inverse_root(gram: Tensor) -> Tensor:
    """``G^(-1/2)`` on the range of a Gram matrix ``[n, n]``."""
    values, vectors = spectrum(gram)
    return (vectors / values) @ vectors.T


def mean_value(gram: Tensor) -> Tensor:
    """The mean of all singular values of a matrix with Gram matrix ``[n, n]``."""
    return spectrum(gram)[0].sum() / len(gram)


def polar(matrix: Tensor) -> Tensor:
    """The orthogonal polar factor of a float64 ``[n, k]``, k at most n: the nearest with orthonormal columns.

    Directions below ``RANK_TOLERANCE`` have none.
    """
    return matrix @ inverse_root(gram_matrix(matrix))
