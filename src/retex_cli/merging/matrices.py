"""Task vectors as matrices, read by row blocks, for methods that need their spectra.

A tensor is the matrix ``d_out x rest``. Spectra come from Gram matrices of the shorter side, summed in float64 over
blocks of rows, so that an embedding is never held whole; a wide matrix is held and treated as its transpose. The merged
matrix is the product of an image of the task vectors (new columns that are combinations of theirs) with a small matrix,
so it leaves block by block as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from retex_cli.merging.linear import mean_of_task_vectors
from retex_cli.merging.view import Kernel, View

CELL_ELEMENTS = 1 << 18
"""Elements of one matrix in the row blocks that are summed: fixed, so that sums do not depend on anything else."""

RANK_TOLERANCE = 1e-6
"""Singular values below this share of the largest are rounding of float32 weights, not directions."""


@dataclass(frozen=True)
class Matrices:
    """The task vectors ``tau_t`` of one tensor as ``T`` matrices of ``rows x columns``, rows >= columns.

    ``transposed`` says that they are the transposes of the tensor's. ``held`` has them in memory, float32
    ``[T, rows, columns]``; without it they are read from the view when they are needed.
    """

    view: View
    rows: int
    columns: int
    transposed: bool
    held: Tensor | None

    @classmethod
    def of(cls, view: View) -> Matrices:
        """The matrices of a tensor with at least two dimensions."""
        columns = view.row
        rows = view.numel // columns
        if rows >= columns:
            return cls(view, rows, columns, False, None)
        held = torch.empty(len(view.tasks), columns, rows)
        for start, base, experts in view.blocks(unit=columns):
            taus = experts.sub_(base).view(len(view.tasks), -1, columns)
            held[:, :, start // columns : start // columns + taus.shape[1]] = taus.transpose(1, 2)
        return cls(view, columns, rows, True, held)

    @property
    def cell(self) -> int:
        """Rows in one block."""
        return max(1, CELL_ELEMENTS // self.columns)

    def blocks(self) -> Iterator[Tensor]:
        """float32 ``[T, r, columns]`` from the first row to the last; the next block may overwrite it."""
        if self.held is not None:
            yield from torch.split(self.held, self.cell, dim=1)
            return
        tasks, unit = len(self.view.tasks), self.cell * self.columns
        for _, base, experts in self.view.blocks(unit=unit):
            taus = experts.sub_(base).view(tasks, -1, self.columns)
            yield from torch.split(taus, self.cell, dim=1)

    def wide_blocks(self) -> Iterator[Tensor]:
        """The same in float64, on the view's device, in memory of their own."""
        for block in self.blocks():
            yield block.to(self.view.device, torch.float64)

    def zeros(self, *shape: int) -> Tensor:
        """A sum to begin with: float64 on the view's device."""
        return torch.zeros(shape, dtype=torch.float64, device=self.view.device)

    def grams(self) -> Tensor:
        """``tau_t^T tau_t`` for every task: float64 ``[T, columns, columns]``."""
        total = self.zeros(len(self.view.tasks), self.columns, self.columns)
        for taus in self.wide_blocks():
            total.baddbmm_(taus.transpose(1, 2), taus)
        return total

    def gram_of(self, image: Image) -> Tensor:
        """``Z^T Z`` for the image ``Z [rows, k]`` of the task vectors: float64 ``[k, k]``."""
        total = self.zeros(image.width, image.width)
        for taus in self.wide_blocks():
            columns = image(taus)
            total.addmm_(columns.T, columns)
        return total

    def kernel(self, image: Image, right: Tensor | None, alpha: float) -> Kernel:
        """``base + alpha Z R`` (or its transpose), ``Z`` the image and ``R [k, columns]`` (None: the identity)."""
        small, image = None if right is None else right.float(), image.single()

        def delta(taus: Tensor) -> Tensor:
            columns = image(taus)
            return (columns if small is None else columns @ small).mul_(alpha)

        if self.held is not None:
            return added(delta(self.held.to(self.view.device)).T.flatten())
        columns, cell = self.columns, self.cell

        def merge(base: Tensor, experts: Tensor, start: int) -> Tensor:
            taus = experts.sub_(base).view(len(experts), -1, columns)
            for block, rows in zip(
                torch.split(taus, cell, dim=1), torch.split(base.view(-1, columns), cell), strict=True
            ):
                rows.add_(delta(block))
            return base

        return Kernel(merge, unit=cell * columns)


@dataclass(frozen=True)
class Image:
    """New columns made of the columns of task vectors: ``[tau_1 W_1 .. tau_T W_T, 0] + sum_t tau_t C``.

    ``own``: every ``W_t [n, k_t]``; ``common``: ``C [n, k]``, k at least the sum of the ``k_t``; None for zeros. With
    ``joined [T n, k]`` instead, the image is ``[tau_1 .. tau_T] J``.
    """

    own: tuple[Tensor, ...] = ()
    common: Tensor | None = None
    joined: Tensor | None = None

    @property
    def width(self) -> int:
        """Number of new columns."""
        whole = self.joined if self.joined is not None else self.common
        return whole.shape[1] if whole is not None else sum(part.shape[1] for part in self.own)

    def __call__(self, taus: Tensor) -> Tensor:
        """``taus [T, r, n]`` to ``[r, k]``."""
        if self.joined is not None:
            return taus.transpose(0, 1).reshape(taus.shape[1], -1) @ self.joined
        parts = [tau @ part for tau, part in zip(taus, self.own, strict=True)] if self.own else []
        if self.common is None:
            return torch.cat(parts, 1)
        image = taus.sum(0) @ self.common
        if parts:
            own = torch.cat(parts, 1)
            image[:, : own.shape[1]] += own
        return image

    def single(self) -> Image:
        """The same in float32."""
        return Image(tuple(part.float() for part in self.own), _float(self.common), _float(self.joined))


def _float(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.float()


def added(delta: Tensor) -> Kernel:
    """``base + delta`` for a merged task vector ``[n]`` that is already there."""

    def merge(base: Tensor, experts: Tensor, start: int) -> Tensor:
        return base.add_(delta[start : start + base.numel()].to(base.device))

    return Kernel(merge)


def spectrum(gram: Tensor, part_of: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Singular values, largest first, and right singular vectors of a matrix with Gram matrix ``[n, n]``.

    ``s [r]`` and ``V [n, r]``; directions below ``RANK_TOLERANCE`` are left out. For what is left of a matrix after a
    projection, ``part_of`` is the Gram matrix of the whole, by which rounding is to be measured.
    """
    values, vectors = torch.linalg.eigh(gram)
    values = values.flip(0).clamp(min=0).sqrt()
    largest = values[:1] if part_of is None else torch.linalg.matrix_norm(part_of, 2).sqrt()
    rank = int((values > RANK_TOLERANCE * largest).sum())
    return values[:rank], vectors.flip(1)[:, :rank]


def left_vectors(matrix: Tensor, count: int) -> Tensor:
    """The first ``count`` left singular vectors of a float64 ``[m, n]``, fewer if its rank is less: ``[m, count]``."""
    if matrix.shape[0] <= matrix.shape[1]:
        return spectrum(matrix @ matrix.T)[1][:, :count]
    values, vectors = spectrum(matrix.T @ matrix)
    return matrix @ (vectors / values)[:, :count]


def inverse_root(gram: Tensor) -> Tensor:
    """``G^(-1/2)`` on the range of a Gram matrix ``[n, n]``."""
    values, vectors = spectrum(gram)
    return (vectors / values) @ vectors.T


def polar(matrix: Tensor) -> Tensor:
    """The orthogonal polar factor of a float64 ``[n, k]``: the nearest matrix with orthonormal columns or rows."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((values > 1e-12 * values[:1]).sum())
    factor: Tensor = left[:, :rank] @ right[:rank]
    return factor


Build = Callable[[Matrices], tuple[Image, Tensor | None] | None]


def for_matrices(view: View, alpha: float, build: Build) -> Kernel:
    """The kernel of a spectral method: ``build`` gives the factors of the merged matrix, or None: the mean."""
    if len(view.shape) < 2 or view.row == 0:
        return mean_of_task_vectors(view, alpha)
    matrices = Matrices.of(view)
    factors = build(matrices)
    return mean_of_task_vectors(view, alpha) if factors is None else matrices.kernel(*factors, alpha)
