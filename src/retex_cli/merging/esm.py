"""ESM: merging in the essential subspaces, the directions in which a task moves its layers' outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retex_cli.merging.depth import block_of, kind_of
from retex_cli.merging.inputs import read_gram
from retex_cli.merging.linear import mean_of_task_vectors
from retex_cli.merging.matrices import added, load_task_vectors
from retex_cli.merging.spectral import tsv_m
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
    factor: float
    biases: bool

    @classmethod
    def of(cls, variant: str, **given: str) -> Switches:
        """Those of the published vision or RoBERTa code, with what is given as "on" or "off" instead of "auto"."""
        vision = variant == "vision"
        published = {"eigenvalues": True, "tasks": vision, "columns": vision, "layers": True, "polar": True}
        chosen = {name: published[name] if word == "auto" else word == "on" for name, word in given.items()}
        return cls(**chosen, factor=2.0 if vision else 1.0, biases=vision)


def esm_survey(views: Sequence[View], *, variant: str, alpha: float, **given: str) -> Mapping[str, float]:
    """Per tensor the scale of its merged task vector among the same tensors of other blocks."""
    switches = Switches.of(variant, **given)
    if not switches.layers:
        return {}
    matrices = [view for view in views if len(view.shape) > 1 and block_of(view.name)]
    norms = dict(zip((v.name for v in matrices), _norms(matrices, switches), strict=True))
    kinds: dict[str, list[float]] = {}
    for name, norm in norms.items():
        kinds.setdefault(kind_of(name), []).append(norm)
    means = {kind: sum(each) / len(each) for kind, each in kinds.items()}
    return {n: (norm / means[kind_of(n)]) ** SCALING_POWER for n, norm in norms.items() if means[kind_of(n)] > 0}


def _norms(views: Sequence[View], switches: Switches) -> list[float]:
    if not views:
        return []
    return views[0].map(lambda view: torch.linalg.vector_norm(_merged(view, switches).double()).item(), views)


def esm(view: View, *, variant: str, alpha: float, **given: str) -> Kernel:
    """Merge the essential directions of every task, weighted, scaled and made orthogonal.

    arXiv 2602.20208 and 2606.19164. ``view.statistics``: ``X_t^T X_t`` of a layer's inputs in the fine-tuned model;
    such layers are merged in their essential subspaces, other matrices by TSV-M, the rest is averaged. ``alpha`` scales
    the former only. ``variant`` is the published vision or RoBERTa code.
    """
    switches = Switches.of(variant, **given)
    if len(view.shape) < 2:
        biased = view.name.endswith("bias") and not switches.biases
        return added(torch.zeros(view.numel)) if biased else mean_of_task_vectors(view)
    survey = view.survey if isinstance(view.survey, Mapping) else {}
    scale = survey.get(view.name, 1.0) * (alpha if view.statistics else 1.0)
    return added(_merged(view, switches).mul_(scale))


def _merged(view: View, switches: Switches) -> Tensor:
    """The merged task vector ``[numel]`` before the scaling between layers: float32."""
    if view.statistics:
        return _essential(view, switches).float().flatten()
    kernel = tsv_m(view, alpha=1.0)
    merged = torch.empty(view.numel, device=view.device)
    for start, base, experts in view.blocks(unit=kernel.unit):
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
        values, directions = shift_spectrum(tau, read_gram(source, view.row).to(view.device))
        coordinates = directions.T @ tau
        norms.append(torch.linalg.vector_norm(coordinates))
        weights = eigenvalue_weights(values[:share]) if switches.eigenvalues else torch.ones_like(values[:share])
        lefts.append(directions[:, :share] * weights)
        rights.append(coordinates[:share] * weights[:, None])
    if switches.tasks:
        mean = torch.stack(norms).mean().clamp(min=1e-300)
        rights = [right * (norm / mean) ** SCALING_POWER for right, norm in zip(rights, norms, strict=True)]
    left, right = torch.cat(lefts, 1), torch.cat(rights)
    if switches.columns:
        lengths = torch.linalg.vector_norm(right, dim=0)
        right = right * (lengths / lengths.mean().clamp(min=1e-300)) ** SCALING_POWER
    if switches.polar:
        left, right = scaled_polar(left), scaled_polar(right)
    return switches.factor * (left @ right)


def shift_spectrum(tau: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, largest first, and directions ``[m, m]`` of the outputs' shift ``dO = X tau^T``.

    ``dO^T dO = tau X^T X tau^T``: the same directions as an SVD of ``dO`` without centring, and always a full basis.
    """
    values, vectors = torch.linalg.eigh(tau @ gram @ tau.T)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def eigenvalue_weights(values: Tensor) -> Tensor:
    """``g = (l / mean l)^0.15``, divided by its mean; ones where there is no shift at all."""
    if not values.numel() or values.sum() <= 0:
        return torch.ones_like(values)
    weights = (values / values.mean()) ** EIGENVALUE_POWER
    return weights / weights.mean()


def scaled_polar(matrix: Tensor) -> Tensor:
    """The orthogonal polar factor times the mean singular value."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    factor: Tensor = left @ right
    mean: Tensor = values.mean()
    return factor * mean
