"""The router of MASS (arXiv 2504.05342): which task's weight directions hold the input's activation?

What follows the paper: a first pass of the merged model gives the activation z that enters a layer; task t's subspace
is spanned by the leading right singular vectors V_t of its task vector of that layer, as many as its merge keeps (a
share 1 / T of them); the residual of the projection, ``|| z - V_t V_t^T z ||``, is smallest for the task of the input.
Nothing is trained, and no data describes a task.

What does not, or had to be decided: z is the mean over positions; queries, keys and values read the same z, so their
task vectors are stacked, each scaled to norm one; the residual is divided by ``|| z ||``, which orders tasks alike in
one layer and lets layers be averaged. The paper routes at one layer, found on validation data: ``chosen_layer`` finds
it on the reference inputs, ``residual`` stays without data and averages all layers. Its second pass, which runs the
experts of several tasks together, is not part of identifying.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from identifiers.form import Fitted, References, unit

TaskVectors = Mapping[str, Mapping[int, Sequence[Tensor]]]
"""Task -> layer of the features -> ``[d_out, d_in]`` task vectors of the matrices that read this layer's output."""


def directions(vectors: Sequence[Tensor], share: float) -> Tensor:
    """The right singular vectors of ``[d_out, d_in]`` task vectors that read the same input: orthonormal rows
    [r, d_in], r being ``share`` of d_in, at least one. Each matrix has the same say: it is scaled to norm one."""
    stacked = torch.cat([vector / vector.norm().clamp(min=1e-12) for vector in vectors])
    rank = max(1, round(share * stacked.shape[1]))
    return torch.linalg.svd(stacked, full_matrices=False)[2][:rank]


def subspaces(task_vectors: TaskVectors) -> list[dict[int, Tensor]]:
    """Of every task, by layer."""
    share = 1 / len(task_vectors)
    return [{layer: directions(found, share) for layer, found in of.items()} for of in task_vectors.values()]


def residual(bases: Sequence[Mapping[int, Tensor]]) -> Fitted:
    """The residuals of ``subspaces``, averaged over their layers."""

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


def chosen_layer(bases: Sequence[Mapping[int, Tensor]], references: References) -> Fitted:
    """The residual of the one layer that names most of the references right, the mean over tasks."""

    def right(layer: int) -> float:
        fitted = residual([{layer: of[layer]} for of in bases])
        found = [(fitted.scores(part).argmin(1) == t).double().mean() for t, part in enumerate(references.values())]
        return float(torch.stack(found).mean())

    best = max(bases[0], key=right)
    fitted = residual([{best: of[best]} for of in bases])
    return Fitted(fitted.scores, fitted.bytes, {"layer": float(best)})
