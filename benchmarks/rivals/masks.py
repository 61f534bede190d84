"""One vector of all tasks and a mask per task: EMR and TALL masks. Both build on the base."""

from __future__ import annotations

import torch
from torch import Tensor

from rivals.form import Case, Files, Known, Tensors
from rivals.pack import Pack, Unpack


def emr(case: Case) -> Files:
    """arXiv 2405.17461, section 3.2: the elected vector, shared; per task the mask of agreeing signs and one rescaler.

    ``tau = sgn(sum_t tau_t) max |tau_t|`` over those that agree in sign, ``M_t = [tau_t tau > 0]`` and
    ``lambda_t = sum |tau_t| / sum |M_t tau|``.
    """
    shared = Pack()
    packs = {task: Pack() for task in case.experts}
    ours, theirs = dict.fromkeys(packs, 0.0), dict.fromkeys(packs, 0.0)
    for name, base in case.known.base.items():
        taus = torch.stack([expert[name] - base for expert in case.experts.values()])
        sign = taus.sum(0).sign()
        unified = (taus * sign).amax(0).clamp(min=0) * sign
        shared.halves(unified)
        for task, tau in zip(packs, taus, strict=True):
            mask = tau * unified > 0
            packs[task].symbols(mask)
            ours[task] += float(tau.abs().sum(dtype=torch.float64))
            theirs[task] += float((unified * mask).abs().sum(dtype=torch.float64))
    for task, pack in packs.items():
        pack.singles(ours[task] / theirs[task] if theirs[task] else 0.0)
    return Files({task: pack.data() for task, pack in packs.items()}, shared.data())


def tall(case: Case, strictness: float) -> Files:
    """arXiv 2405.07813, equation 5: ``tau = sum_t tau_t``, shared; per task ``M_t = [|tau_t| >= l |tau - tau_t|]``.

    ``strictness`` is the paper's ``lambda``, which it picks out of 0.2 to 0.6 on validation data.
    """
    shared = Pack()
    packs = {task: Pack() for task in case.experts}
    for name, base in case.known.base.items():
        taus = torch.stack([expert[name] - base for expert in case.experts.values()])
        total = taus.sum(0)
        shared.halves(total)
        for task, tau in zip(packs, taus, strict=True):
            packs[task].symbols(tau.abs() >= strictness * (total - tau).abs())
    for pack in packs.values():
        pack.singles(1.0)
    return Files({task: pack.data() for task, pack in packs.items()}, shared.data())


def decode(known: Known, files: Files, task: str) -> dict[str, Tensor]:
    """``base + lambda_t M_t tau``."""
    shared, own = Unpack(files.shared), Unpack(files.tasks[task])
    parts = {name: _masked(shared, own, base.shape) for name, base in known.base.items()}
    (scale,) = own.singles(1)
    return _added(known.base, parts, scale)


def _masked(shared: Unpack, own: Unpack, shape: torch.Size) -> Tensor:
    return shared.halves(*shape) * own.symbols(*shape)


def _added(base: Tensors, parts: Tensors, scale: float) -> dict[str, Tensor]:
    return {name: tensor + scale * parts[name] for name, tensor in base.items()}
