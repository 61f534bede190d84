"""What was prepared of one tensor, as tensors and back: so it can lie on disk until the budget is shared out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from retex_cli.offsets.allocate import Candidates
from retex_cli.offsets.decompose import Components
from retex_cli.offsets.fit import Prepared

_CURVES = ("energies", "kept", "bits")
_PARTS = ("left", "values", "right")
_VECTOR, _REST = "vector", "rest"


def to_tensors(prepared: Prepared) -> dict[str, Tensor]:
    """Named tensors that hold all of it."""
    what, candidates = prepared
    curves = {name: torch.from_numpy(getattr(candidates, name)) for name in _CURVES}
    curves[_REST] = torch.tensor([candidates.rest], dtype=torch.float64)
    parts = {name: getattr(what, name) for name in _PARTS} if isinstance(what, Components) else {_VECTOR: what}
    return {**curves, **{name: part.cpu() for name, part in parts.items()}}


def from_tensors(tensors: Mapping[str, Tensor]) -> Prepared:
    """The inverse of ``to_tensors``, in the same memory but for the short curves."""
    rest = float(tensors[_REST])
    candidates = Candidates(**{name: tensors[name].numpy().copy() for name in _CURVES}, rest=rest)
    if _VECTOR in tensors:
        return tensors[_VECTOR], candidates
    return Components(tensors["left"], tensors["values"], tensors["right"], rest), candidates
