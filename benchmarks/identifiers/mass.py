"""The router of MASS (arXiv 2504.05342): which task's weight directions hold the input's activation? No data needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from identifiers.form import Fitted, unit


def directions(vectors: Sequence[Tensor], share: float) -> Tensor:
    """The right singular vectors of ``[d_out, d_in]`` task vectors that read the same input: orthonormal rows
    [r, d_in], r being ``share`` of d_in, at least one. Each matrix has the same say: it is scaled to norm one."""
    stacked = torch.cat([vector / vector.norm().clamp(min=1e-12) for vector in vectors])
    rank = max(1, round(share * stacked.shape[1]))
    return torch.linalg.svd(stacked, full_matrices=False)[2][:rank]


def residual(task_vectors: Mapping[str, Mapping[int, Sequence[Tensor]]]) -> Fitted:
    """``task_vectors``: task -> layer of the features -> matrices that read this layer's output.

    The score is ``|| z - V V^T z || / || z ||``, z the pooled activation, V a share 1 / T of each layer's directions as
    in the paper's merge, here averaged over the layers: the paper reads one layer, chosen on data.
    """
    share = 1 / len(task_vectors)
    bases = [{layer: directions(found, share) for layer, found in of.items()} for of in task_vectors.values()]

    def scores(features: Tensor) -> Tensor:
        columns = []
        for of in bases:
            each = []
            for layer, basis in of.items():
                rows = unit(features[:, layer, : basis.shape[1]].float())
                each.append((1 - (rows @ basis.T).square().sum(1)).clamp(min=0).sqrt())
            columns.append(torch.stack(each).mean(0))
        return torch.stack(columns, 1)

    return Fitted(scores, sum(basis.nbytes for of in bases for basis in of.values()))
