"""Merges in the singular subspaces of task vectors: TSV-M, Iso-C, Iso-CTS.

All three say that other tensors than matrices are averaged. Their code takes two-dimensional tensors for matrices;
here a convolution is one too, as ``d_out x rest``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retex_cli.merging.decompose import (
    add_gram,
    gram_matrix,
    inverse_root,
    leading,
    mean_value,
    mirror,
    of_full_rank,
    polar,
    spectrum,
    thin_svd,
)
from retex_cli.merging.linear import mean_of_task_vectors
from retex_cli.merging.matrices import Image, Matrices, for_matrices, product
from retex_cli.merging.view import Kernel, View


def tsv_m(view: View, *, alpha: float) -> Kernel:
    """Keep the top singular vectors of each task, make them orthogonal to those of the others, add up.

    arXiv 2412.00081, algorithm 1 (TSV-Merge): of each ``tau_t = U_t S_t V_t^T`` the first ``r / T`` components stay;
    ``U = [U_1 .. U_T]`` and ``V`` are replaced by their polar factors; ``theta = theta_0 + alpha U S V^T``. The paper's
    ``alpha`` without validation is 1. A matrix with fewer than T components is averaged.
    """
    return joined_vectors(view, alpha, scaled=False)


def joined_vectors(view: View, alpha: float, scaled: bool) -> Kernel:
    """TSV-M; ``scaled``: with each polar factor times the mean singular value of what it replaces."""

    def build(matrices: Matrices) -> tuple[Image, Tensor | None] | None:
        share = matrices.columns // len(view.tasks)
        parts = [leading(gram, share) for gram in matrices.grams()] if share else []
        if not any(len(values) for values, _ in parts):
            return None
        values, right = torch.cat([s for s, _ in parts]), torch.cat([v for _, v in parts], 1)
        left = Image(own=tuple(v / s for s, v in parts))  # U_t = tau_t V_t / S_t
        gram = matrices.gram_of(left)
        if scaled:
            values = values * mean_value(gram) * mean_value(gram_matrix(right))
        return left, inverse_root(gram) * values @ polar(right).T

    if (factors := view.factors()) is not None:
        return _joined_of_factors(view, factors, alpha, scaled)
    return for_matrices(view, alpha, build)


def _joined_of_factors(view: View, factors: Sequence[tuple[Tensor, Tensor]], alpha: float, scaled: bool) -> Kernel:
    share = min(view.numel // view.row, view.row) // len(view.tasks)
    if not share:
        return mean_of_task_vectors(view, alpha)
    parts = [tuple(part[..., :share] for part in thin_svd(*pair)) for pair in factors]
    left, values, right = (torch.cat(each, dim) for each, dim in zip(zip(*parts, strict=True), (1, 0, 1), strict=True))
    if scaled:
        values = values * mean_value(gram_matrix(left)) * mean_value(gram_matrix(right))
    return product(view, polar(left) * values, polar(right).T, alpha)


def iso_c(view: View, *, alpha: float) -> Kernel:
    """Task arithmetic with a flat spectrum: every singular value of the summed task vectors becomes their mean.

    arXiv 2502.04959, algorithm 1: ``sum_t tau_t = U S V^T``, ``theta = theta_0 + alpha mean(S) U V^T``.
    """

    def build(matrices: Matrices) -> tuple[Image, Tensor | None] | None:
        values, vectors = spectrum(next(matrices.grams()))
        if not len(values):
            return None
        return Image(own=(values.sum() / matrices.columns * (vectors / values) @ vectors.T,)), None

    factors = view.factors()
    if factors is not None and sum(len(right) for _, right in factors) < min(view.shape[0], view.row):
        return _iso_of_factors(view, factors, alpha)
    return for_matrices(view, alpha, build, summed=True)


def _iso_of_factors(view: View, factors: Sequence[tuple[Tensor, Tensor]], alpha: float) -> Kernel:
    lefts, rights = zip(*factors, strict=True)
    left, values, right = thin_svd(torch.cat(lefts, 1), torch.cat(rights))
    return product(view, left * values.sum() / min(view.shape[0], view.row), right.T, alpha)


def iso_cts(view: View, *, common: float, alpha: float) -> Kernel:
    """A flat spectrum over the common subspace of all tasks and, for the rest, each task's own directions.

    arXiv 2502.04959, algorithm 2: the top directions of ``sum_t tau_t`` fill the share ``common`` (0.8 in the paper) of
    the rank; what each task has outside of them fills the rest in equal parts; both sides are made orthogonal by their
    polar factors, and every singular value becomes the mean of those collected.
    """

    def build(matrices: Matrices) -> tuple[Image, Tensor | None] | None:
        rank, tasks = matrices.columns, len(view.tasks)
        own = round((rank - int(rank * common)) / tasks)
        shared = rank - own * tasks
        if shared < 0:
            return None
        parts = (_outside_right if matrices.transposed else _outside_left)(matrices, shared, own)
        if parts is None:
            return None
        mean = torch.cat([*parts.values]).sum() / rank
        return parts.left, mean * parts.root @ parts.right.T

    return for_matrices(view, alpha, build)


@dataclass(frozen=True)
class _Parts:
    """All directions that Iso-CTS collects: the left ones as an image, to be multiplied by ``root`` to be orthogonal.

    ``right [n, k]`` is orthogonal already; ``values`` are the tasks' singular values and then the common ones.
    """

    left: Image
    root: Tensor
    right: Tensor
    values: tuple[Tensor, ...]


def _outside_right(matrices: Matrices, shared: int, own: int) -> _Parts | None:
    """The common subspace on the right, the shorter side: what is outside is ``tau R`` for the directions ``R`` left.

    Those are few, so the tasks' spectra are those of small matrices, and the right vectors of the tasks are orthogonal
    to the common ones.
    """
    gram = matrices.gram_of_sum()
    eigenvalues, basis = (part.flip(-1) for part in torch.linalg.eigh(gram))
    values, vectors = (part[..., :shared] for part in of_full_rank(eigenvalues, basis))
    rest = basis[:, len(values) :]
    grams = matrices.zeros(matrices.count, rest.shape[1], rest.shape[1])
    squares = matrices.zeros(matrices.count)
    for taus in matrices.wide_blocks():
        squares += taus.square().sum((1, 2))
        for total, tau in zip(grams, taus, strict=True):
            add_gram(total, tau @ rest)
    if not squares.any():
        return None
    found = [leading(mirror(each), own, norm) for each, norm in zip(grams, squares.sqrt(), strict=True)]
    rights = [rest @ v for _, v in found]
    joined = torch.cat(rights, 1)
    scaled = torch.cat([torch.zeros_like(joined), vectors / values], 1)
    left = Image(tuple(right / s for right, (s, _) in zip(rights, found, strict=True)), scaled)
    right = torch.cat([polar(joined), vectors], 1)
    return _Parts(left, inverse_root(matrices.gram_of(left)), right, (*(s for s, _ in found), values))


def _outside_left(matrices: Matrices, shared: int, own: int) -> _Parts | None:
    """The common subspace on the left, the longer side: what is outside is ``tau - U_c U_c^T tau``, ``U_c = M V_c/s``.

    The left vectors of the tasks are orthogonal to the common ones.
    """
    grams, crossed = _grams_with_sum(matrices)
    if not grams.any():
        return None
    values, vectors = (part[..., :shared] for part in spectrum(crossed.sum(0)))
    scaled = vectors / values
    found, shifts = [], []
    for gram, cross in zip(grams, crossed, strict=True):
        mirror(gram)
        inside = scaled.T @ cross  # U_c^T tau
        s, v = leading(gram - gram_matrix(inside), own, gram.diagonal().sum().sqrt())
        found.append((s, v))
        shifts.append(scaled @ (inside @ (v / s)))
    outside = Image(tuple(v / s for s, v in found), -torch.cat(shifts, 1))
    left = Image(outside.own, torch.cat([-torch.cat(shifts, 1), scaled], 1))
    inner = inverse_root(matrices.gram_of(outside))
    root = torch.eye(left.width, dtype=inner.dtype, device=inner.device)
    root[: len(inner), : len(inner)] = inner
    right = polar(torch.cat([*(v for _, v in found), vectors], 1))
    return _Parts(left, root, right, (*(s for s, _ in found), values))


def _grams_with_sum(matrices: Matrices) -> tuple[Tensor, Tensor]:
    """Upper triangles of ``tau_t^T tau_t`` and ``M^T tau_t`` for ``M = sum_s tau_s``: two float64 ``[T, n, n]``."""
    n = matrices.columns
    grams, crossed = matrices.zeros(matrices.count, n, n), matrices.zeros(matrices.count, n, n)
    for taus in matrices.wide_blocks():
        total = taus.sum(0).T
        for gram, cross, tau in zip(grams, crossed, taus, strict=True):
            add_gram(gram, tau)
            cross.addmm_(total, tau)
    return grams, crossed
