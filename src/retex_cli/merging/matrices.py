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

from retex_cli.merging.decompose import add_gram, mirror
from retex_cli.merging.linear import mean_of_task_vectors, sum_rows
from retex_cli.merging.view import Kernel, View

CELL_ELEMENTS = 1 << 18
"""Elements of one matrix in the row blocks that are summed: fixed, so that sums do not depend on anything else."""


@dataclass(frozen=True)
class Matrices:
    """The task vectors ``tau_t`` of one tensor as ``T`` matrices of ``rows x columns``, rows >= columns.

    With ``summed`` there is one matrix alone, their sum. ``transposed`` says that they are the transposes of the
    tensor's. ``held`` has them in memory, ``[T, rows, columns]``; without it they are read from the view when
    they are needed.
    """

    view: View
    rows: int
    columns: int
    transposed: bool
    held: Tensor | None
    summed: bool = False

    @classmethod
    def of(cls, view: View, summed: bool = False) -> Matrices:
        """The matrices of a tensor with at least two dimensions."""
        columns = view.row
        rows = view.numel // columns
        if rows > columns:
            return cls(view, rows, columns, False, None, summed)
        return cls(view, columns, rows, True, load_task_vectors(view, summed).transpose(1, 2), summed)

    @property
    def count(self) -> int:
        """How many matrices there are."""
        return 1 if self.summed else len(self.view.tasks)

    @property
    def cell(self) -> int:
        """Rows in one block."""
        return max(1, CELL_ELEMENTS // self.columns)

    def _taus(self, base: Tensor, experts: Tensor) -> Tensor:
        """``[T, r, columns]`` of one block of the view, in its memory."""
        return _block(base, experts, self.summed).view(self.count, -1, self.columns)

    def blocks(self) -> Iterator[Tensor]:
        """float32 (a sum: float64) ``[T, r, columns]`` from the first row to the last; the next may overwrite it."""
        if self.held is not None:
            yield from torch.split(self.held, self.cell, dim=1)
            return
        for _, base, experts in self.view.blocks(unit=self.cell * self.columns):
            yield from torch.split(self._taus(base, experts), self.cell, dim=1)

    def wide_blocks(self, task: int | None = None) -> Iterator[Tensor]:
        """The same in float64, on the view's device; the next block overwrites it. ``task``: held ones of one alone."""
        wide: Tensor | None = None
        for block in self.blocks() if self.held is None or task is None else self._held_blocks(task):
            if wide is None:
                wide = torch.empty_like(block, dtype=torch.float64, device=self.view.device)
            yield wide[:, : block.shape[1]].copy_(block)

    def _held_blocks(self, task: int) -> Iterator[Tensor]:
        assert self.held is not None
        yield from torch.split(self.held[task : task + 1], self.cell, dim=1)

    def zeros(self, *shape: int) -> Tensor:
        """A sum to begin with: float64 on the view's device."""
        return torch.zeros(shape, dtype=torch.float64, device=self.view.device)

    def grams(self) -> Iterator[Tensor]:
        """``tau_t^T tau_t`` of one task after the other: float64 ``[columns, columns]``."""
        if self.held is None:
            total = self.zeros(self.count, self.columns, self.columns)
            for taus in self.wide_blocks():
                for gram, tau in zip(total, taus, strict=True):
                    add_gram(gram, tau)
            yield from map(mirror, total)
        else:
            for task in range(self.count):
                gram = self.zeros(self.columns, self.columns)
                for taus in self.wide_blocks(task):
                    add_gram(gram, taus[0])
                yield mirror(gram)

    def gram_of_sum(self) -> Tensor:
        """``M^T M`` for the sum ``M`` of the task vectors: float64 ``[columns, columns]``."""
        total = self.zeros(self.columns, self.columns)
        for taus in self.wide_blocks():
            add_gram(total, taus.sum(0))
        return mirror(total)

    def gram_of(self, image: Image) -> Tensor:
        """``Z^T Z`` for the image ``Z [rows, k]`` of the task vectors: float64 ``[k, k]``."""
        total = self.zeros(image.width, image.width)
        for taus in self.wide_blocks():
            add_gram(total, image(taus))
        return mirror(total)

    def kernel(self, image: Image, right: Tensor | None, alpha: float) -> Kernel:
        """``base + alpha Z R`` (or its transpose), ``Z`` the image and ``R [k, columns]`` (None: the identity)."""
        if self.held is not None:
            merged = torch.empty(self.columns, self.rows)
            for start, taus in zip(range(0, self.rows, self.cell), self.wide_blocks(), strict=True):
                new = image(taus)
                merged[:, start : start + len(new)] = (new if right is None else new @ right).mul_(alpha).T
            return added(merged.flatten())
        small, image = None if right is None else right.float(), image.single()

        def delta(taus: Tensor) -> Tensor:
            new = image(taus.float())
            return (new if small is None else new @ small).mul_(alpha)

        columns, cell = self.columns, self.cell

        def merge(base: Tensor, experts: Tensor, start: int) -> Tensor:
            blocks = torch.split(self._taus(base, experts), cell, dim=1)
            for block, rows in zip(blocks, torch.split(base.view(-1, columns), cell), strict=True):
                rows.add_(delta(block))
            return base

        return Kernel(merge, unit=cell * columns)


def _block(base: Tensor, experts: Tensor, summed: bool = False) -> Tensor:
    """Task vectors ``[T, n]`` of a block, in the experts' memory, or their sum ``[1, n]`` in float64."""
    taus = experts.sub_(base)
    return sum_rows(taus.double())[None] if summed else taus


def load_task_vectors(view: View, summed: bool = False) -> Tensor:
    """Task vectors as matrices, float32 ``[T, m, n]``, or their sum, float64 ``[1, m, n]``.

    The same row of all tasks lies side by side in memory.
    """
    count, row = 1 if summed else len(view.tasks), view.row
    taus = torch.empty(view.numel // row, count, row, dtype=torch.float64 if summed else torch.float32)
    for start, base, experts in view.blocks(unit=row):
        block = _block(base, experts, summed).view(count, -1, row)
        taus[start // row : start // row + block.shape[1]] = block.transpose(0, 1)
    return taus.transpose(0, 1)


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

    return Kernel(merge, base_only=True)


def unchanged(base_only: bool = False) -> Kernel:
    """The base. Experts that nobody has looked at are read all the same: a NaN in one is never passed over."""
    return Kernel(lambda base, experts, start: base, base_only=base_only)


def product(view: View, left: Tensor, right: Tensor, alpha: float) -> Kernel:
    """``base + alpha L R`` for factors ``[m, k]`` and ``[k, n]`` of the merged task vector, row block by row block."""
    cell = max(1, CELL_ELEMENTS // view.row)
    left, right = (left * alpha).float(), right.float()

    def merge(base: Tensor, experts: Tensor, start: int) -> Tensor:
        rows = left[start // view.row : (start + base.numel()) // view.row]
        for block, part in zip(torch.split(base.view(-1, view.row), cell), torch.split(rows, cell), strict=True):
            block.addmm_(part, right)
        return base

    return Kernel(merge, unit=cell * view.row, base_only=True)


Build = Callable[[Matrices], tuple[Image, Tensor | None] | None]


def for_matrices(view: View, alpha: float, build: Build, summed: bool = False) -> Kernel:
    """The kernel of a spectral method: ``build`` gives the factors of the merged matrix, or None: the mean."""
    if len(view.shape) < 2 or view.row == 0:
        return mean_of_task_vectors(view, alpha)
    matrices = Matrices.of(view, summed)
    factors = build(matrices)
    return mean_of_task_vectors(view, alpha) if factors is None else matrices.kernel(*factors, alpha)
