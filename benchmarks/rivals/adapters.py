"""The residual adapters of ESM++: the directions in which an expert still moves a layer's outputs."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from rivals.form import Case, Files, Known, Tensors
from rivals.low_rank import as_matrix, pays, truncated
from rivals.pack import Pack, Unpack

_PUBLISHED = re.compile(
    r"(query|key|value|q_proj|k_proj|v_proj|q_lin|k_lin|v_lin|qkv|in_proj|c_attn"
    r"|intermediate\.dense|lin1|fc1|c_fc|up_proj|gate_proj|mlp\.0)[._]weight$"
)


def is_published(name: str) -> bool:
    """Whether the paper puts an adapter there: queries, keys and values, and the way up in the MLP."""
    return _PUBLISHED.search(name) is not None


def adapters(case: Case, rank: int, *, everywhere: bool) -> Files:
    """arXiv 2606.19164 (ESM++): ``B`` are the first ``rank`` directions of the shift ``X R^T``, ``A = B^T R``.

    ``R`` is the offset from the merged checkpoint, ``X`` the layer's inputs in the expert. On the published layers, or
    ``everywhere`` on each with a Gram matrix, and then with all tensors of fewer than two dimensions in float16.
    Float16 factors; the prototypes of its router are not counted.
    """
    grams = case.grams()
    return Files(
        {
            task: _encode(case.known.merged, expert, grams[task], rank, everywhere)
            for task, expert in case.experts.items()
        }
    )


def _encode(merged: Tensors, expert: Tensors, grams: Tensors, rank: int, everywhere: bool) -> bytes:
    pack = Pack()
    chosen = [name in grams and (everywhere or is_published(name)) for name in merged]
    pack.shorts([rank, int(everywhere)])
    pack.symbols(torch.tensor(chosen))
    for (name, tensor), adapted in zip(merged.items(), chosen, strict=True):
        offset = expert[name] - tensor
        if tensor.ndim < 2 and everywhere:
            pack.halves(offset)
        elif adapted:
            matrix = as_matrix(offset)
            if not pays(rank, *matrix.shape):
                pack.halves(matrix)
                continue
            directions = shift_directions(matrix, grams[name], rank)
            pack.halves(directions)
            pack.halves(directions.T @ matrix)
    return pack.data()


def shift_directions(offset: Tensor, gram: Tensor, rank: int) -> Tensor:
    """The first ``rank`` left singular vectors of ``R (X^T X)^(1/2)``, those of ``(X R^T)^T``: float32 [m, rank]."""
    values, vectors = torch.linalg.eigh(gram.double())
    return truncated(offset.double() @ (vectors * values.clamp(min=0).sqrt()), rank)[0]


def decode(known: Known, files: Files, task: str) -> dict[str, Tensor]:
    """``merged + B A`` where there is an adapter."""
    unpack = Unpack(files.tasks[task])
    rank, everywhere = unpack.shorts(2)
    chosen = unpack.symbols(len(known.merged)).tolist()
    found = {}
    for (name, tensor), adapted in zip(known.merged.items(), chosen, strict=True):
        found[name] = tensor
        if tensor.ndim < 2 and everywhere:
            found[name] = tensor + unpack.halves(*tensor.shape)
        elif adapted:
            m, n = as_matrix(tensor).shape
            product = unpack.halves(m, rank) @ unpack.halves(rank, n) if pays(rank, m, n) else unpack.halves(m, n)
            found[name] = tensor + product.reshape(tensor.shape)
    return found
