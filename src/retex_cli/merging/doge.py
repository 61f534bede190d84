"""DOGE: task arithmetic whose task vectors first learn a shared correction outside their common subspace."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retex_cli.merging.decompose import left_vectors
from retex_cli.merging.depth import block_of
from retex_cli.merging.matrices import CELL_ELEMENTS, added, load_task_vectors, unchanged
from retex_cli.merging.selection import shrink_bound, top_magnitudes
from retex_cli.merging.view import Kernel, View

LEARNING_RATE, BETAS, EPSILON = 1e-4, (0.9, 0.999), 1e-8
"""Adam as the authors use it: their learning rate, torch's defaults otherwise."""


@dataclass(frozen=True)
class _Survey:
    thresholds: Mapping[str, float]
    in_blocks: bool


def doge_survey(views: Sequence[View], *, density: float, **_: float) -> _Survey:
    """The top-k is taken over all merged matrices of a task together; which those are depends on the model's names."""
    matrices = [view for view in views if len(view.shape) > 1]
    in_blocks = any(block_of(view.name) for view in matrices)
    treated = [view for view in matrices if block_of(view.name) or not in_blocks]
    return _Survey(top_magnitudes(treated, density) if treated else {}, in_blocks)


def doge(view: View, *, density: float, scale: float, subspace: int, steps: int) -> Kernel:
    """Learn one correction for all task vectors by projected gradient descent, trim, add up with per-layer weights.

    arXiv 2501.01230, section 3 (data-free objective, shared subspace, task-aware weights), as in the authors' code:
    with ``l_t = scale / |tau_t|``, a correction D of all task vectors minimises
    ``sum_t sum_rows (tau_t . (tau_t - sum_s l_s (tau_s + D)))^2`` by ``steps`` of Adam, gradients projected out of the
    ``rank / subspace`` directions that the tasks share; ``theta = theta_0 + sum_t l_t mask_t (tau_t + D)`` with masks
    of the top ``density`` of each task vector.
    Only matrices inside the numbered blocks take part, all other tensors stay the base's. Defaults are the authors'.
    """
    survey = view.survey if isinstance(view.survey, _Survey) else doge_survey([view], density=density)
    if len(view.shape) < 2 or (survey.in_blocks and not block_of(view.name)):
        return unchanged()
    taus = load_task_vectors(view).to(view.device)
    norms = [torch.linalg.vector_norm(tau.double()).item() for tau in taus]
    moved = [i for i, norm in enumerate(norms) if norm > 0]
    if not moved:
        return unchanged()
    if len(moved) < len(norms):
        taus = taus[moved]
    weights = [scale / norms[i] for i in moved]
    correction = _correct(taus, weights, _shared_basis(taus, subspace), steps)
    merged = torch.zeros_like(correction)
    tasks = [view.tasks[i] for i in moved]
    for tau, task, weight in zip(taus, tasks, weights, strict=True):
        kept = torch.hardshrink(tau, shrink_bound(survey.thresholds[task])).ne_(0)
        merged.add_(tau.add_(correction).mul_(kept).mul_(weight))
    return added(merged.flatten())


def _shared_basis(taus: Tensor, subspace: int) -> Tensor:
    """The leading left directions ``[m, r / subspace]`` of the tasks' top ``r / T`` left singular vectors together."""
    rank = min(taus.shape[1:])
    joined = torch.cat([left_vectors(tau.double(), rank // len(taus)) for tau in taus], 1)
    return left_vectors(joined, rank // subspace).to(taus.dtype)


def _correct(taus: Tensor, weights: Sequence[float], basis: Tensor, steps: int) -> Tensor:
    """The correction ``[m, n]`` after ``steps`` of Adam from zero."""
    total, rows = sum(weights), taus.transpose(0, 1)
    mixed = torch.einsum("mtn,t->mn", rows, rows.new_tensor(weights))
    constant = torch.stack([torch.linalg.vecdot(tau, tau - mixed) for tau in taus], 1)
    del mixed
    correction, gradient, first, second = (torch.zeros_like(rows[:, 0]) for _ in range(4))
    at_once = max(1, CELL_ELEMENTS // rows[0].numel())  # the second of both products finds its rows in the cache
    products = [torch.split(part, at_once) for part in (rows, constant, correction, gradient)]
    states = [torch.split(part.view(-1), CELL_ELEMENTS) for part in (gradient, first, second, correction)]
    for step in range(1, steps + 1):
        for row, fixed, now, out in zip(*products, strict=True):
            error = fixed[:, :, None] - total * (row @ now[:, :, None])
            torch.mul(error.mT @ row, -2 * total, out=out[:, None])
        gradient.addmm_(basis, basis.T @ gradient, alpha=-1)
        for slope, mean, square, part in zip(*states, strict=True):
            _adam(slope, mean, square, part, step)
    return correction


def _adam(gradient: Tensor, first: Tensor, second: Tensor, weights: Tensor, step: int) -> None:
    first.lerp_(gradient, 1 - BETAS[0])
    second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    root = second.sqrt().div_(math.sqrt(1 - BETAS[1] ** step)).add_(EPSILON)
    weights.addcdiv_(first, root, value=-LEARNING_RATE / (1 - BETAS[0] ** step))
