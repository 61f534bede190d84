"""ESM: merging in the essential subspaces, the directions in which a task moves its layers' outputs."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from retex_cli.merging.decompose import gram_matrix, leading, spectrum
from retex_cli.merging.depth import block_of, kind_of
from retex_cli.merging.inputs import read_gram
from retex_cli.merging.linear import mean_of_task_vectors
from retex_cli.merging.matrices import added, load_task_vectors, unchanged
from retex_cli.merging.spectral import joined_vectors
from retex_cli.merging.view import Kernel, View

EIGENVALUE_POWER, SCALING_POWER = 0.15, 2


@dataclass(frozen=True)
class Switches:
    """The parts of the method, each of which can be left out."""

    eigenvalues: bool
    tasks: bool
    columns: bool
    layers: bool
    polar: bool
    vision: bool

    @classmethod
    def of(cls, variant: str, **given: str) -> Switches:
        """Those of the published vision or RoBERTa code, with what is given as "on" or "off" instead of "auto"."""
        vision = variant == "vision"
        published = {"eigenvalues": True, "tasks": vision, "columns": vision, "layers": True, "polar": True}
        chosen = {name: published[name] if word == "auto" else word == "on" for name, word in given.items()}
        return cls(**chosen, vision=vision)


class Kept:
    """Merged task vectors, float32, in a temporary file between the survey and the merge, and the scale of each.

    Computing them a second time would double the time, holding them would take the memory of a model.
    """

    def __init__(self, views: Sequence[View]) -> None:
        file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as this
        weakref.finalize(self, file.close)
        self._file = file.fileno()
        ends = accumulate(4 * view.numel for view in views)
        self._places = {view.name: end - 4 * view.numel for view, end in zip(views, ends, strict=True)}
        self.scales: dict[str, float] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def write(self, name: str, merged: Tensor) -> None:
        """Keep the merged task vector ``[numel]``."""
        left, place = memoryview(merged.cpu().numpy().tobytes()), self._places[name]
        while left:
            count = os.pwrite(self._file, left, place)
            left, place = left[count:], place + count

    def read(self, name: str, start: int, length: int) -> Tensor:
        """Its elements ``start .. start + length``, scaled."""
        data = os.pread(self._file, 4 * length, self._places[name] + 4 * start)
        return torch.frombuffer(bytearray(data), dtype=torch.float32).mul_(self.scales[name])


def esm_survey(views: Sequence[View], *, variant: str, alpha: float, **given: str) -> Kept | None:
    """Merge every matrix in the blocks; per tensor the scale among the same tensors of other blocks."""
    switches = Switches.of(variant, **given)
    matrices = [view for view in views if len(view.shape) > 1 and view.numel and block_of(view.name)]
    if not switches.layers or not matrices:
        return None
    kept = Kept(matrices)

    def norm(view: View) -> float:
        merged = _merged(view, switches)
        kept.write(view.name, merged)
        return float(torch.linalg.vector_norm(merged.double()).item())

    norms = dict(zip((view.name for view in matrices), matrices[0].map(norm, matrices), strict=True))
    kinds: dict[str, list[float]] = {}
    for name, each in norms.items():
        kinds.setdefault(kind_of(name), []).append(each)
    means = {kind: sum(each) / len(each) for kind, each in kinds.items()}
    for view in matrices:
        mean = means[kind_of(view.name)]
        between = (norms[view.name] / mean) ** SCALING_POWER if mean > 0 else 1.0
        kept.scales[view.name] = between * (alpha if view.statistics else 1.0)
    return kept


def esm(view: View, *, variant: str, alpha: float, **given: str) -> Kernel:
    """Merge the essential directions of every task, weighted, scaled and made orthogonal.

    arXiv 2602.20208 and 2606.19164. ``view.statistics``: ``X_t^T X_t`` of a layer's inputs in the fine-tuned model;
    such layers are merged in their essential subspaces, other matrices by TSV-M, the rest is averaged. ``alpha`` scales
    the former only. ``variant`` is the published vision or RoBERTa code; the latter leaves out biases, and its TSV-M
    multiplies each polar factor by the mean singular value of what it replaces.
    """
    switches = Switches.of(variant, **given)
    if len(view.shape) < 2:
        biased = view.name.endswith("bias") and not switches.vision
        return unchanged() if biased else mean_of_task_vectors(view)
    if isinstance(view.survey, Kept) and view.name in view.survey:
        return _from(view.survey, view.name)
    return added(_merged(view, switches).mul_(alpha if view.statistics else 1.0))


def _from(kept: Kept, name: str) -> Kernel:
    def merge(base: Tensor, experts: Tensor, start: int) -> Tensor:
        return base.add_(kept.read(name, start, base.numel()).to(base.device))

    return Kernel(merge, base_only=True)


def _merged(view: View, switches: Switches) -> Tensor:
    """The merged task vector ``[numel]`` before the scaling between layers: float32."""
    if view.statistics:
        return _essential(view, switches).float().flatten()
    kernel = joined_vectors(view, 1.0, scaled=not switches.vision)
    merged = torch.empty(view.numel, device=view.device)
    length = view.block_length(kernel.unit)
    for start in range(0, view.numel, length):
        base, experts = view.load(start, min(length, view.numel - start), kernel.base_only)
        base, experts = base.to(view.device), experts.to(view.device)
        before = base.clone()
        merged[start : start + base.numel()] = kernel.merge(base, experts, start).sub_(before)
    return merged


def _essential(view: View, switches: Switches) -> Tensor:
    """Essential subspace decomposition of every task, joined: float64 ``[m, n]``."""
    taus = load_task_vectors(view)
    share = taus.shape[1] // len(taus)
    lefts, rights, norms = [], [], []
    for tau32, source in zip(taus, view.statistics, strict=True):
        tau = tau32.to(view.device, torch.float64)
        values, directions = shift_spectrum(tau, read_gram(source, view.row).to(view.device), share)
        norms.append(torch.linalg.vector_norm(tau))  # that of all coordinates: the directions are a basis
        weights = eigenvalue_weights(values) if switches.eigenvalues else torch.ones_like(values)
        lefts.append(directions * weights)
        rights.append(directions.T @ tau * weights[:, None])
    if switches.tasks:
        mean = torch.stack(norms).mean().clamp(min=1e-300)
        rights = [right * (norm / mean) ** SCALING_POWER for right, norm in zip(rights, norms, strict=True)]
    left, right = torch.cat(lefts, 1), torch.cat(rights)
    if switches.columns:
        lengths = torch.linalg.vector_norm(right, dim=0)
        right = right * (lengths / lengths.mean().clamp(min=1e-300)) ** SCALING_POWER
    if switches.polar:
        left, right = scaled_polar(left), scaled_polar(right)
    merged = left @ right
    return 2 * merged if switches.vision else merged


def shift_spectrum(tau: Tensor, gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first eigenvalues ``[count]``, largest first, and directions ``[m, count]`` of the shift ``dO = X tau^T``.

    ``dO^T dO = tau X^T X tau^T``: the same directions as an SVD of ``dO`` without centring, and always ``count`` of
    them, whatever the rank.
    """
    if tau.shape[0] > tau.shape[1]:
        values, vectors = spectrum(gram)
        shifted = tau @ (vectors * values)  # shifted shifted^T = tau gram tau^T, on the shorter side
        lengths, coordinates = leading(gram_matrix(shifted), count)
        if len(lengths) == count:
            return lengths.square(), shifted @ (coordinates / lengths)
    whole = tau @ gram @ tau.T
    lengths, directions = leading(whole, count)
    if len(lengths) == count:
        return lengths.square(), directions
    values, directions = torch.linalg.eigh(whole)
    return values.flip(0).clamp(min=0)[:count], directions.flip(1)[:, :count]


def eigenvalue_weights(values: Tensor) -> Tensor:
    """``g = (l / mean l)^0.15``, divided by its mean; ones where there is no shift at all."""
    if not values.numel() or values.sum() <= 0:
        return torch.ones_like(values)
    weights = (values / values.mean()) ** EIGENVALUE_POWER
    return weights / weights.mean()


def scaled_polar(matrix: Tensor) -> Tensor:
    """The orthogonal polar factor times the mean singular value; directions without one stay zero."""
    if matrix.shape[0] < matrix.shape[1]:
        return scaled_polar(matrix.T).T
    values, vectors = spectrum(gram_matrix(matrix))
    return matrix @ ((values.sum() / matrix.shape[1]) * (vectors / values) @ vectors.T)
