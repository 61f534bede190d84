"""Merges in the singular subspaces of task vectors: TSV-M, Iso-C, Iso-CTS.

All three say that other tensors than matrices are averaged. Their code takes two-dimensional tensors for matrices;
here a convolution is one too, as ``d_out x rest``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from retex_cli.merging.matrices import Image, Matrices, for_matrices, inverse_root, polar, spectrum
from retex_cli.merging.view import Kernel, View


def tsv_m(view: View, *, alpha: float) -> Kernel:
    """Keep the top singular vectors of each task, make them orthogonal to those of the others, add up.

    arXiv 2412.00081, algorithm 1 (TSV-Merge): of each ``tau_t = U_t S_t V_t^T`` the first ``r / T`` components stay;
    ``U = [U_1 .. U_T]`` and ``V`` are replaced by their polar factors; ``theta = theta_0 + alpha U S V^T``. The paper's
    ``alpha`` without validation is 1. A matrix with fewer than T components is averaged.
    """

    def build(matrices: Matrices) -> tuple[Image, Tensor | None] | None:
        share = matrices.columns // len(view.tasks)
        parts = [tuple(part[..., :share] for part in spectrum(gram)) for gram in matrices.grams()] if share else []
        if not any(len(values) for values, _ in parts):
            return None
        values, right = torch.cat([s for s, _ in parts]), torch.cat([v for _, v in parts], 1)
        left = Image(own=tuple(v / s for s, v in parts))  # U_t = tau_t V_t / S_t
        return left, inverse_root(matrices.gram_of(left)) * values @ polar(right).T

    return for_matrices(view, alpha, build)


def iso_c(view: View, *, alpha: float) -> Kernel:
    """Task arithmetic with a flat spectrum: every singular value of the summed task vectors becomes their mean.

    arXiv 2502.04959, algorithm 1: ``sum_t tau_t = U S V^T``, ``theta = theta_0 + alpha mean(S) U V^T``.
    """

    def build(matrices: Matrices) -> tuple[Image, Tensor | None] | None:
        gram = matrices.zeros(matrices.columns, matrices.columns)
        for taus in matrices.wide_blocks():
            total = taus.sum(0)
            gram.addmm_(total.T, total)
        values, _ = spectrum(gram)
        if not len(values):
            return None
        return Image(common=values.sum() / matrices.columns * inverse_root(gram)), None

    return for_matrices(view, alpha, build)


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
        grams, crossed = _grams_with_sum(matrices)
        values, vectors = (part[..., :shared] for part in spectrum(crossed.sum(0)))
        if not grams.any():
            return None
        split = _right_split if matrices.transposed else _left_split
        parts = [split(gram, cross, values, vectors, own) for gram, cross in zip(grams, crossed, strict=True)]
        left = Image(tuple(p.own for p in parts), torch.cat([*(-p.common for p in parts), vectors / values], 1))
        right = torch.cat([*(p.right for p in parts), vectors], 1)
        mean = torch.cat([*(p.values for p in parts), values]).sum() / rank
        return left, mean * inverse_root(matrices.gram_of(left)) @ polar(right).T

    return for_matrices(view, alpha, build)


def _grams_with_sum(matrices: Matrices) -> tuple[Tensor, Tensor]:
    """``tau_t^T tau_t`` and ``M^T tau_t`` for ``M = sum_s tau_s``: two float64 ``[T, n, n]``."""
    tasks, n = len(matrices.view.tasks), matrices.columns
    grams, crossed = matrices.zeros(tasks, n, n), matrices.zeros(tasks, n, n)
    for taus in matrices.wide_blocks():
        grams.baddbmm_(taus.transpose(1, 2), taus)
        crossed.baddbmm_(taus.sum(0).T.expand(tasks, -1, -1), taus)
    return grams, crossed


@dataclass(frozen=True)
class _Split:
    """What a task has outside the common subspace: its left vectors are ``tau own - M common``, for the sum ``M``."""

    own: Tensor
    common: Tensor
    right: Tensor
    values: Tensor


def _left_split(gram: Tensor, cross: Tensor, values: Tensor, vectors: Tensor, own: int) -> _Split:
    """Of ``w = tau - U_c U_c^T tau`` with ``U_c = M V_c / s_c``, the first ``own`` directions."""
    inside = (vectors / values).T @ cross  # U_c^T tau
    s, v = (part[..., :own] for part in spectrum(gram - inside.T @ inside, part_of=gram))
    return _Split(v / s, (vectors / values) @ (inside @ (v / s)), v, s)


def _right_split(gram: Tensor, cross: Tensor, values: Tensor, vectors: Tensor, own: int) -> _Split:
    """The same for transposed matrices, whose common subspace is on the right: ``w = tau (1 - V_c V_c^T)``."""
    outside = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) - vectors @ vectors.T
    s, v = (part[..., :own] for part in spectrum(outside @ gram @ outside, part_of=gram))
    left = outside @ (v / s)
    return _Split(left, torch.zeros_like(left), v, s)
