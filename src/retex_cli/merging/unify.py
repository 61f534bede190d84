"""Merges that build one unified task vector entry by entry: EMR, Consensus, SCE."""

from __future__ import annotations

import torch
from torch import Tensor

from retex_cli.merging.linear import sum_rows, weigh_
from retex_cli.merging.reduce import block_sums
from retex_cli.merging.selection import Population, keep_count, order_statistics
from retex_cli.merging.sparse import elected_
from retex_cli.merging.view import Kernel, View


def emr(view: View) -> Kernel:
    """Per entry the elected sign with the largest magnitude that has it.

    arXiv 2405.17461, section 3.2 (Elect): ``sgn(sum_t tau_t) * max_t |tau_t|`` over the tasks with that sign. This is
    the unified model; the paper's masks and rescalers bring tasks back from it, which here is the work of offsets.
    """

    def merge(base: Tensor, experts: Tensor, start: int) -> Tensor:
        taus = experts.sub_(base)
        sign = sum_rows(taus).sign_()
        first, *others = taus.mul_(sign).unbind(0)
        for tau in others:
            torch.maximum(first, tau, out=first)
        return first.clamp_(min=0).mul_(sign).add_(base)

    return Kernel(merge)


def consensus(view: View, *, tall_lambda: float, agreement: int, alpha: float) -> Kernel:
    """Task arithmetic on the entries that matter to at least ``agreement`` tasks.

    arXiv 2405.07813, equations 5 and 6: an entry matters to task t (its TALL mask) where
    ``|tau_t| >= lambda |sum_s tau_s - tau_t|``. The paper picks lambda in 0.2 .. 0.6 per task on validation data; 0.4
    is the middle. ``agreement = 2`` is the paper's, ``alpha`` as in task arithmetic.
    """

    def merge(base: Tensor, experts: Tensor, start: int) -> Tensor:
        taus = experts.sub_(base)
        total = sum_rows(taus)
        votes, rest = torch.zeros_like(total), torch.empty_like(total)
        for tau in taus.unbind(0):
            torch.sub(total, tau, out=rest)
            votes.add_(torch.ge(tau.abs_(), rest.abs_().mul_(tall_lambda)).to(votes.dtype))
        total.mul_(votes.ge(agreement).to(votes.dtype))
        return total.mul_(alpha).add_(base)

    return Kernel(merge)


def _variance(taus: Tensor) -> Tensor:
    """Variance over tasks, biased, of each entry of ``taus [T, n]``: ``[n]``."""
    count = taus.shape[0]
    mean = sum_rows(taus).div_(count)
    return sum_rows((taus - mean).square_()).div_(count)


_VARIANCE = Population(
    lambda view: ("variance",), lambda view, base, experts: _variance(experts.sub_(base)).unsqueeze_(0)
)


def _differing(view: View, density: float) -> int:
    """How many entries are a share of those with a variance above zero, rounded down."""
    found = block_sums(view, lambda base, experts: _variance(experts.sub_(base)).sign_().unsqueeze_(0))
    return int(density * int(found.item()))


def sce(view: View, *, density: float, of: str, floor: float, cancelled: str) -> Kernel:
    """Select entries by variance, weigh tasks by their energy there, erase minority signs.

    arXiv 2408.07990 (FuseChat), section 3.3, per tensor: the ``density`` of entries whose variance over tasks is
    largest is selected; task t weighs ``sum tau_t^2`` over them, normalised; entries against the sign of the sum are
    erased, and the rest is averaged with the weights of the tasks that are left, as in the authors' code. Default: the
    paper's 10 %. mergekit takes the share ``of`` the entries that differ at all, and equal weights where the mean
    square of all task vectors together is below a ``floor`` of 1e-6.
    """
    cut = -1.0
    if density < 1:
        keep = _differing(view, density) if of == "differing" else keep_count(view.numel, density)
        cut = order_statistics([view], lambda _, n: (keep,), _VARIANCE)["variance"][0]

    def select_(taus: Tensor) -> Tensor:
        return taus.mul_(_variance(taus).ge_(cut))

    energy = block_sums(view, lambda base, experts: select_(experts.sub_(base)).square_())
    total = energy.sum().item()
    enough = total > 0 and total / view.numel >= floor
    weights = (energy / total).tolist() if enough else [1 / len(view.tasks)] * len(view.tasks)

    def merge(base: Tensor, experts: Tensor, start: int) -> Tensor:
        taus = select_(experts.sub_(base))
        sign = elected_(taus, cancelled)
        present = weigh_(taus.sign(), weights)
        return sum_rows(weigh_(taus, weights)).div_(sum_rows(present).clamp_(min=1e-30)).mul_(sign).add_(base)

    return Kernel(merge)
