"""LiNeS: scale the merged task vector with depth. A modifier of any method."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from retex_cli.merging.linear import sum_rows
from retex_cli.merging.reduce import block_sums, task_vectors
from retex_cli.merging.view import Kernel, View


def lines(kernel: Kernel, alpha: float, beta: float, depth: float | None) -> Kernel:
    """The merge of ``kernel`` with its task vector scaled by ``alpha + beta * depth``.

    arXiv 2410.17146, equation 3: block l of L is scaled by ``alpha + beta l / (L - 1)``, what lies outside the blocks
    (``depth`` None) by ``alpha``.
    """
    scale = alpha + beta * (depth or 0.0)

    def merge(base: Tensor, experts: Tensor, start: int) -> Tensor:
        before = base.clone()
        return kernel.merge(base, experts, start).sub_(before).mul_(scale).add_(before)

    return replace(kernel, merge=merge)


def l1_norms(view: View, kernel: Kernel) -> tuple[float, float]:
    """``|sum_t tau_t|_1`` and ``|merged - base|_1`` of one tensor, from which the paper takes its ``alpha``."""
    summed = block_sums(view, lambda base, experts: sum_rows(task_vectors(base, experts)).abs_().unsqueeze(0))
    merged = 0.0
    for start, base, experts in view.blocks(unit=kernel.unit):
        base, experts = base.to(view.device), experts.to(view.device)
        before = base.clone()
        merged += kernel.merge(base, experts, start).sub_(before).abs_().double().sum().item()
    return summed.item(), merged


def paper_alpha(norms: list[tuple[float, float]], tasks: int) -> float:
    """Section 5.2 of the paper: ``alpha = |sum_t tau_t|_1 / (T |tau_merged|_1)`` over the whole model."""
    summed, merged = sum(pair[0] for pair in norms), sum(pair[1] for pair in norms)
    return summed / merged / tasks if merged > 0 else 1.0
