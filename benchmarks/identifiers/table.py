"""Every published identifier that reads pooled features; ESM++, which reads every layer's input, is in ``esm``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from identifiers import mass, nearest, router, subspace
from identifiers.form import Identifier


def identifiers(layers: Sequence[int], task_vectors: Mapping[str, Mapping[int, Sequence[Tensor]]]) -> list[Identifier]:
    """``layers``: those of retex's own signatures, for the router on the same features. ``task_vectors``: see
    ``mass``."""
    same = partial(router.logistic, layers=layers)
    return [
        Identifier("svd residual, final embedding (SiM, ReTeX)", "base", subspace.residual, "of the base"),
        Identifier("nearest mean, final embedding", "merged", nearest.nearest_mean),
        Identifier("1-NN, final embedding", "merged", nearest.nearest_neighbour, "stores the references"),
        Identifier("linear router, final embedding", "merged", partial(router.logistic, layers=(-1,)), "trained"),
        Identifier("linear router, our layers", "merged", same, "trained"),
        Identifier("MASS", "merged", lambda _: mass.residual(task_vectors), "data-free", data_free=True),
    ]
