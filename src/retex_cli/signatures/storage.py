"""What a signature file keeps of one task, and how small.

A task is a mean, a basis with its spectrum, and per reference input three numbers for calibration; the inputs
themselves are not kept. A basis of the Mahalanobis score is stored as signed bytes with one scale per vector: rounding
adds noise of about 1 % of a vector's length, spread evenly over all dimensions, far below the ridge that the score adds
there. The residual score has no ridge and few vectors, so its bases are float16, and made orthonormal again on loading.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch

from retex_cli.errors import RetexError
from retex_cli.signatures.scatter import Scatter

LEVELS = 127
"""Largest byte of a stored basis vector."""


@dataclass(frozen=True, slots=True)
class StoredTask:
    """The stored arrays of one task with r directions of size D from n inputs.

    ``mean`` float32 [D]; ``basis`` int8 or float16 [r, D], row i to be multiplied by ``scale[i]``; ``scale`` float32
    [r]; ``spectrum`` float32 [r]; ``residual`` float32 [1], the variance per dimension outside the basis;
    ``calibration`` float32 [n, 3]: leave-one-out distance under the task's own covariance, entropy in nats, surprise.
    """

    mean: torch.Tensor
    basis: torch.Tensor
    scale: torch.Tensor
    spectrum: torch.Tensor
    residual: torch.Tensor
    calibration: torch.Tensor

    @property
    def count(self) -> int:
        """Reference inputs the task was fitted on."""
        return len(self.calibration)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Arrays by field name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def scatter(self) -> Scatter:
        """In float64, as every score uses it."""
        if self.basis.dtype == torch.int8:
            basis = self.basis.double() * self.scale.double()[:, None]
        else:
            basis = orthonormal(self.basis.double())
        return Scatter(self.count, self.mean.double(), basis, self.spectrum.double(), float(self.residual))


def orthonormal(rows: torch.Tensor) -> torch.Tensor:
    """The nearest orthonormal rows (polar factor) to almost orthonormal ``rows`` [r, D]."""
    if len(rows) == 0:
        return rows
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    polar: torch.Tensor = (vectors * values.rsqrt()) @ vectors.T @ rows
    return polar


def store(found: Scatter, calibration: torch.Tensor, *, small: bool) -> StoredTask:
    """Round one task's ``Scatter`` to bytes (``small``) or float16; ``calibration`` [n, 3]."""
    if small:
        scale = (found.basis.abs().amax(1) / LEVELS).float()
        basis = (found.basis / scale.double()[:, None]).round().to(torch.int8)
    else:
        scale = torch.ones(len(found.basis))
        basis = found.basis.to(torch.float16)
    residual = torch.tensor([found.residual])
    return StoredTask(found.mean.float(), basis, scale, found.spectrum.float(), residual, calibration.float())


def load(task: str, tensors: Mapping[str, torch.Tensor], size: int) -> StoredTask:
    """One task from ``task/field`` entries; RetexError where one is missing or does not fit the vector ``size``."""
    found = {}
    for field in fields(StoredTask):
        name = f"{task}/{field.name}"
        if name not in tensors:
            raise RetexError(f"signatures: no tensor {name!r}", "The file is damaged; build the signatures again.")
        found[field.name] = tensors[name]
    rank, count = found["spectrum"].numel(), found["calibration"].shape[0] if found["calibration"].ndim else 0
    shapes = {
        "mean": (size,),
        "basis": (rank, size),
        "scale": (rank,),
        "spectrum": (rank,),
        "residual": (1,),
        "calibration": (count, 3),
    }
    for name, shape in shapes.items():
        if tuple(found[name].shape) != shape or (name == "calibration" and count < 2):
            raise RetexError(
                f"signatures: {task}/{name} is {list(found[name].shape)}, expected {list(shape)}",
                "The file is damaged; build the signatures again.",
            )
    return StoredTask(**found)
