"""The offset predictor of ReTeX (arXiv 2606.26902): ``delta_hat(e) = U diag(C e) V^T``, linear in a task embedding e.

The factors of all tasks stand side by side in ``U`` and ``V``; row t of ``C`` is one for the components of task t and
zero elsewhere. A one-hot ``e`` gives a task's own offset, a mix interpolates.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from retex_cli.offsets.domain import from_domain, to_domain
from retex_cli.offsets.stream import Factors, Shape

Embedding = Mapping[str, float]


class Predictor:
    """Decoded offsets of some tasks over one merged checkpoint."""

    def __init__(self, factors: Mapping[str, Mapping[str, Factors]]) -> None:
        self._factors = factors

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names, sorted."""
        return tuple(sorted(self._factors))

    def factors(self, task: str, name: str) -> Factors | None:
        """The decoded components of one task's offset of tensor ``name``; None if it has none."""
        return self._factors[task].get(name)

    def delta(
        self, name: str, shape: Shape, embedding: Embedding, device: torch.device, out: Tensor | None = None
    ) -> Tensor | None:
        """The offset of tensor ``name``, float32 of ``shape`` on ``device``; None where no task has one.

        It is put into ``out`` where that is given: contiguous, of this type and shape, and there. Tasks are added in
        sorted order, so the same embedding always gives the same bits.
        """
        total: Tensor | None = None
        for task in sorted(embedding):
            factors = self._factors[task].get(name)
            if factors is None or embedding[task] == 0:
                continue
            part = factors.delta(shape, device, out if total is None else None)
            if embedding[task] != 1:
                part.mul_(embedding[task])
            total = part if total is None else total.add_(part)
        return total

    def add_to(
        self, name: str, merged: Tensor, embedding: Embedding, device: torch.device, out: Tensor | None = None
    ) -> Tensor:
        """``merged`` with its offset, float32 on ``device``; the very tensor, wherever it is, where no task has one.

        ``out`` as for ``delta``; what is returned may be that.
        """
        delta = self.delta(name, tuple(merged.shape), embedding, device, out)
        # into the offset's own memory: a third tensor of this size would cost more than the sum
        return merged if delta is None else from_domain(name, delta.add_(to_domain(name, merged.to(device))))
