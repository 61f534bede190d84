"""Every published identifier that reads pooled features; ESM++, which reads every layer's input, is in ``esm``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from identifiers import mass, nearest, router, subspace
from identifiers.form import Identifier

SAME = "linear router, our layers"
"""The trained router on the features that retex's signatures read: the bar where siblings put another out of reach."""


def identifiers(
    layers: Sequence[int],
    task_vectors: Mapping[str, Mapping[int, Sequence[Tensor]]],
    penalties: Sequence[float] = router.PENALTIES,
) -> list[Identifier]:
    """``layers``: those of retex's own signatures, for the router on the same features. ``task_vectors``: see
    ``mass``. ``penalties`` are the routers' to choose from: a single one is for timing."""
    last, same = (partial(router.logistic, layers=which, penalties=penalties) for which in ((-1,), layers))
    bases = mass.subspaces(task_vectors)
    return [
        Identifier("svd residual, final embedding (SiM, ReTeX)", "base", subspace.residual, "of the base"),
        Identifier("nearest mean, final embedding", "merged", nearest.nearest_mean),
        Identifier("1-NN, final embedding", "merged", nearest.nearest_neighbour, "stores the references"),
        Identifier("linear router, final embedding", "merged", last, "trained"),
        Identifier(SAME, "merged", same, "trained"),
        Identifier("MASS, all layers", "merged", lambda _: mass.residual(bases), "data-free", data_free=True),
        Identifier("MASS, one layer", "merged", partial(mass.chosen_layer, bases), "the layer found on the references"),
    ]
