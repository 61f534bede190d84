"""Every published identifier that reads pooled features; ESM++, which reads every layer's input, is in ``esm``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from identifiers import mass, nearest, router, subspace
from identifiers.form import Fitted, Identifier, References

SAME = "linear router, our layers"
"""The trained router on the features that retex's signatures read: the bar where siblings put another out of reach."""


def identifiers(
    layers: Callable[[], Sequence[int]],
    task_vectors: Callable[[], mass.TaskVectors],
    penalties: Sequence[float] = router.PENALTIES,
) -> list[Identifier]:
    """``layers`` gives those of retex's own signatures, for the router on the same features, ``task_vectors`` what
    ``mass`` reads; both are asked where they are needed. ``penalties`` are the routers' to choose from: a single one is
    for timing."""
    bases = cache(lambda: mass.subspaces(task_vectors()))

    def last(references: References) -> Fitted:
        return router.logistic(references, (-1,), penalties)

    def same(references: References) -> Fitted:
        return router.logistic(references, layers(), penalties)

    def one(references: References) -> Fitted:
        return mass.chosen_layer(bases(), references)

    return [
        Identifier("svd residual, final embedding (SiM, ReTeX)", "base", subspace.residual, "of the base"),
        Identifier("nearest mean, final embedding", "merged", nearest.nearest_mean),
        Identifier("1-NN, final embedding", "merged", nearest.nearest_neighbour, "stores the references"),
        Identifier("linear router, final embedding", "merged", last, "trained"),
        Identifier(SAME, "merged", same, "trained"),
        Identifier("MASS, all layers", "merged", lambda _: mass.residual(bases()), "data-free", data_free=True),
        Identifier("MASS, one layer", "merged", one, "the layer found on the references"),
    ]
