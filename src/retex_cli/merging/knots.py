"""KnOTS: align LoRA task vectors in one shared basis, then merge there by another method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from retex_cli.merging.decompose import add_gram, mirror, spectrum
from retex_cli.merging.matrices import Image, Matrices, load_task_vectors, product, unchanged
from retex_cli.merging.reduce import block_sums, task_vectors
from retex_cli.merging.table import METHODS
from retex_cli.merging.view import Kernel, View


@dataclass(frozen=True, slots=True)
class _Aligned:
    """Coordinates of one task vector in the shared basis, as a source."""

    where: str
    values: Tensor

    def read_into(self, start: int, out: Tensor) -> None:
        out.copy_(self.values.reshape(-1)[start : start + out.numel()])


def knots(view: View, *, inner: str, density: float, alpha: float) -> Kernel:
    """Merge the coordinates of all task vectors in the left singular basis of their concatenation.

    arXiv 2410.19735, section 4: ``[tau_1 .. tau_T] = U S [V_1 .. V_T]^T``; the ``S V_t^T`` are merged by the ``inner``
    method, the result is ``theta_0 + U merged``. Defaults are the authors': TIES, top 20 %, scale 0.6. The top-k is
    taken per tensor. Made for LoRA experts, whose concatenation has a small rank; tensors that are no matrices are
    merged by the inner method as they are.
    """
    if len(view.shape) < 2 or view.row == 0:
        return _inner(view, inner, density, alpha)
    if (factors := view.factors()) is not None:
        return _of_factors(view, factors, lambda coordinates: _merge_aligned(view, coordinates, inner, density, alpha))
    energy = block_sums(view, lambda base, experts: task_vectors(base, experts).square_())
    if not energy.any():
        return unchanged()
    rows, columns = view.numel // view.row, view.row

    def merge_aligned(coordinates: Tensor) -> Tensor:
        return _merge_aligned(view, coordinates, inner, density, alpha)

    if rows > len(view.tasks) * columns:
        return _streamed(view, merge_aligned)
    return _held(view, rows, columns, merge_aligned)


def _inner(view: View, inner: str, density: float, alpha: float) -> Kernel:
    method = METHODS[inner]
    given = {"density": density, "alpha": alpha, "scope": "tensor"}
    options = method.resolve({option.name: given[option.name] for option in method.options if option.name in given})
    return cast(Kernel, method.function()(view, **options))  # type: ignore[operator]


def _merge_aligned(view: View, coordinates: Tensor, inner: str, density: float, alpha: float) -> Tensor:
    """Coordinates ``[T, r, n]`` merged by the inner method, around a base of zeros: float64 ``[r, n]``."""
    shape = tuple(coordinates.shape[1:])
    sources = tuple(_Aligned(source.where, c.float()) for source, c in zip(view.experts, coordinates, strict=True))
    zero = _Aligned(view.base.where, torch.zeros(shape))
    aligned = View(view.name, shape, view.tasks, zero, sources, view.seed)
    kernel = _inner(aligned, inner, density, alpha)
    blocks = [kernel.merge(base, experts, start).clone() for start, base, experts in aligned.blocks(kernel.unit)]
    return torch.cat(blocks).view(shape).double()


def _streamed(view: View, merge_aligned: Callable[[Tensor], Tensor]) -> Kernel:
    """More rows than all columns together: the basis from the Gram matrix of all columns, the rest row by row."""
    matrices = Matrices(view, view.numel // view.row, view.row, False, None)
    tasks, n = len(view.tasks), view.row

    gram = matrices.zeros(tasks * n, tasks * n)
    for taus in matrices.wide_blocks():
        add_gram(gram, taus.transpose(0, 1).reshape(-1, tasks * n))
    values, vectors = spectrum(mirror(gram))
    aligned = (vectors.view(tasks, n, -1) * values).transpose(1, 2)  # S V_t^T
    merged = merge_aligned(aligned.cpu()).to(vectors.device)
    return matrices.kernel(Image(joined=vectors / values), merged, 1.0)


def _held(view: View, rows: int, columns: int, merge_aligned: Callable[[Tensor], Tensor]) -> Kernel:
    """Otherwise the basis from the Gram matrix of the rows, of task vectors in memory."""
    held = load_task_vectors(view)
    gram = torch.zeros(rows, rows, dtype=torch.float64, device=view.device)
    for tau in held:
        add_gram(gram, tau.to(view.device, torch.float64).T)
    _, basis = spectrum(mirror(gram))
    coordinates = torch.empty(len(held), basis.shape[1], columns)
    for tau, out in zip(held, coordinates, strict=True):
        out.copy_(basis.T @ tau.to(view.device, torch.float64))
    del held
    return product(view, basis, merge_aligned(coordinates).to(view.device), 1.0)


def _of_factors(
    view: View, factors: Sequence[tuple[Tensor, Tensor]], merge_aligned: Callable[[Tensor], Tensor]
) -> Kernel:
    """Task vectors of low rank, ``L_t R_t``: with ``[L_1 .. L_T] = Q C`` the basis is Q times that of ``[C_t R_t]``."""
    whole = torch.linalg.qr(torch.cat([left for left, _ in factors], 1))
    inner = whole.R.split([left.shape[1] for left, _ in factors], 1)
    parts = [c @ right for c, (_, right) in zip(inner, factors, strict=True)]
    _, vectors = spectrum(torch.stack([part @ part.T for part in parts]).sum(0))
    if not vectors.numel():
        return unchanged(base_only=True)
    coordinates = torch.stack([vectors.T @ part for part in parts])
    return product(view, whole.Q @ vectors, merge_aligned(coordinates.cpu()).to(vectors.device), 1.0)
