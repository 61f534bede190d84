"""The offset predictor of ReTeX (arXiv 2606.26902): ``delta_hat(e) = U diag(C e) V^T``, linear in a task embedding e.

The factors of all tasks stand side by side in ``U`` and ``V``, and with them those that several tasks have in common;
column t of ``C`` is one for the components of task t and for common ones that it uses, and zero elsewhere. A one-hot
``e`` gives a task's offset, a mix interpolates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retex_cli.offsets.blocks import spans
from retex_cli.offsets.domain import from_domain, is_variance, to_domain
from retex_cli.offsets.stream import Factors

Embedding = Mapping[str, float]


@dataclass(frozen=True)
class Offset:
    """What an embedding adds to tensor ``name``: shares of tasks and their factors, on the device that adds them and of
    the type that they are added in."""

    name: str
    shares: Sequence[tuple[float, Factors]]

    @property
    def dtype(self) -> torch.dtype:
        """What ``add_to`` gives."""
        return self.shares[0][1].left.dtype

    def add_to(self, merged: Tensor, start: int, out: Tensor | None = None) -> Tensor:
        """The merged tensor's elements from ``start`` on, flat, with their offset: in ``out`` where given.

        That may be ``merged``."""
        device = self.shares[0][1].left.device
        narrow = self.dtype != torch.float32  # which no variance is: see ``Predictor.offset``
        value = merged.to(device, self.dtype) if narrow else to_domain(self.name, merged.to(device))
        if out is None:
            value = value.clone() if value is merged else value
        elif out is not value:
            value = out.copy_(value)
        for share, factors in self.shares:
            factors.add_to(value, start, share)
        return value if narrow else from_domain(self.name, value)


class Together(Mapping[str, Factors]):
    """The sum of two offsets, by tensor name: their components side by side."""

    def __init__(self, first: Mapping[str, Factors], second: Mapping[str, Factors]) -> None:
        self._first, self._second = first, second

    def __getitem__(self, name: str) -> Factors:
        if name not in self._first or name not in self._second:
            return (self._first if name in self._first else self._second)[name]
        first, second = self._first[name], self._second[name]
        if first.right is None or second.right is None:  # one-dimensional: both are
            return Factors(first.left + second.left, None)
        return Factors(torch.cat([first.left, second.left], 1), torch.cat([first.right, second.right]))

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._first, *self._second}))

    def __len__(self) -> int:
        return len({*self._first, *self._second})


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

    def offset(
        self, name: str, embedding: Embedding, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Offset | None:
        """The offset of tensor ``name``; None where no task has one.

        Tasks are added in sorted order, so the same embedding always gives the same bits. ``dtype``: what a matrix may
        be added in where it is rounded but once, so not to a mix; everything else is added in float32.
        """
        held = {task: self._factors[task].get(name) for task in sorted(embedding) if embedding[task] != 0}
        shares = [(embedding[task], factors) for task, factors in held.items() if factors is not None]
        once = len(shares) == 1 and shares[0][1].right is not None and not is_variance(name)
        moved = [(share, factors.to(device, dtype if once else torch.float32)) for share, factors in shares]
        return Offset(name, moved) if moved else None

    def add_to(self, name: str, merged: Tensor, embedding: Embedding, device: torch.device) -> Tensor:
        """``merged`` with its offset, float32 on ``device``; the very tensor, wherever it is, where no task has one."""
        offset = self.offset(name, embedding, device)
        if offset is None:
            return merged
        whole = torch.empty(merged.shape, dtype=torch.float32, device=device)
        for start, stop in spans(tuple(merged.shape), device):
            whole.view(-1)[start:stop] = offset.add_to(merged.reshape(-1)[start:stop], start)
        return whole
