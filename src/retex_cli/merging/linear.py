"""Merges that are linear in the experts."""

from __future__ import annotations

from torch import Tensor

from retex_cli.merging.view import Kernel, View


def sum_rows(rows: Tensor) -> Tensor:
    """Sum of ``rows [T, n]`` over T, one row after the other, into the first: the same bits however n is cut."""
    first, *others = rows.unbind(0)
    for row in others:
        first.add_(row)
    return first


def average(view: View) -> Kernel:
    """The plain mean of the experts' weights.

    Model soups, arXiv 2203.05482 (the uniform soup): ``theta = 1/T sum_t theta_t``. The base is not used.
    """
    count = len(view.tasks)

    def merge(base: Tensor, experts: Tensor, start: int) -> Tensor:
        return sum_rows(experts).div_(count)

    return Kernel(merge)


def task_arithmetic(view: View, *, alpha: float) -> Kernel:
    """The base plus the scaled sum of task vectors.

    arXiv 2212.04089, section 2: ``theta = theta_0 + alpha sum_t tau_t``. The default ``alpha = 0.4`` is the one that
    the paper found to serve without validation data (as quoted in arXiv 2306.01708, section 4).
    """

    def merge(base: Tensor, experts: Tensor, start: int) -> Tensor:
        return sum_rows(experts.sub_(base)).mul_(alpha).add_(base)

    return Kernel(merge)
