"""Merges that need statistics of each task's inputs: Fisher, RegMean. The statistics are given, not collected here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from retex_cli.merging.linear import average, sum_rows
from retex_cli.merging.matrices import added, load_task_vectors
from retex_cli.merging.view import Kernel, Source, View


def read_blocks(sources: Sequence[Source], start: int, length: int) -> Tensor:
    """Statistics of all tasks for elements ``start ..``: float32 ``[T, length]``."""
    out = torch.empty(len(sources), length)
    for source, row in zip(sources, out, strict=True):
        source.read_into(start, row)
    return out


def fisher_survey(views: Sequence[View], *, normalise: bool, floor: float) -> dict[str, float]:
    """Per task one over the norm of its Fisher information over the whole model, if they are to be normalised."""
    squares = {task: 0.0 for view in views for task in view.tasks}
    for view in views if normalise else ():
        for start in range(0, view.numel, 1 << 18) if view.statistics else ():
            block = read_blocks(view.statistics, start, min(1 << 18, view.numel - start))
            for task, square in zip(view.tasks, block.double().square().sum(1).tolist(), strict=True):
                squares[task] += square
    return {task: 1 / math.sqrt(square) if square > 0 else 1.0 for task, square in squares.items()}


def fisher(view: View, *, normalise: bool, floor: float) -> Kernel:
    """The mean of the experts' weights, each weighted by its diagonal Fisher information.

    arXiv 2111.09832, equation 4: ``theta = sum_t F_t theta_t / sum_t F_t``, with ``F_t`` at least ``floor`` (1e-6 in
    the authors' code, so that unimportant weights are averaged) and, as there, divided by its norm over the model.
    ``view.statistics``: the diagonal Fisher information, in the shape of the tensor. Without it: the average.
    """
    if not view.statistics:
        return average(view)
    scales = view.survey if isinstance(view.survey, Mapping) else dict.fromkeys(view.tasks, 1.0)

    def merge(base: Tensor, experts: Tensor, start: int) -> Tensor:
        weights = read_blocks(view.statistics, start, base.numel()).to(base.device)
        for row, task in zip(weights.unbind(0), view.tasks, strict=True):
            row.clamp_(min=floor).mul_(scales[task])
        return sum_rows(experts.mul_(weights)).div_(sum_rows(weights))

    return Kernel(merge)


def read_gram(source: Source, size: int) -> Tensor:
    """``X^T X`` of a layer's inputs: float64 ``[size, size]``."""
    out = torch.empty(size * size)
    source.read_into(0, out)
    return out.view(size, size).double()


def regmean(view: View, *, shrink: float) -> Kernel:
    """The linear layer whose outputs are closest to every expert's on that expert's own inputs.

    arXiv 2212.09849, equation 2: with ``G_t = X_t^T X_t``, off-diagonal entries times ``shrink`` (0.9 in the paper),
    ``W^T = (sum_t G_t)^-1 sum_t G_t W_t^T``. ``view.statistics``: ``G_t [n, n]`` of layers with ``n`` inputs. Tensors
    without it are averaged.
    """
    if not view.statistics:
        return average(view)
    taus, size = load_task_vectors(view), view.row
    total = torch.zeros(size, size, dtype=torch.float64, device=view.device)
    mixed = torch.zeros(taus.shape[1], size, dtype=torch.float64, device=view.device)
    for tau, source in zip(taus, view.statistics, strict=True):
        gram = read_gram(source, size).to(view.device)
        diagonal = gram.diagonal().clone()
        gram.mul_(shrink).diagonal().copy_(diagonal)
        total += gram
        mixed.addmm_(tau.to(view.device, torch.float64), gram)
    return added(_solve(total, mixed).float().flatten())


def _solve(gram: Tensor, mixed: Tensor) -> Tensor:
    """``mixed gram^-1``; directions that no input ever took have no solution and keep the base."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    if not failed:
        return torch.cholesky_solve(mixed.T, factor).T
    inverse: Tensor = torch.linalg.pinv(gram, hermitian=True, rtol=1e-10)
    return mixed @ inverse
