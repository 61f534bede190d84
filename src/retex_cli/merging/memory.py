"""The same methods on tensors that are already in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from retex_cli.merging.engine import Merge, stream
from retex_cli.merging.table import check_tasks, find_method, options_for
from retex_cli.merging.view import View


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor in memory as a source of blocks."""

    name: str
    values: Tensor

    @property
    def where(self) -> str:
        """What messages call it."""
        return self.name

    def read_into(self, start: int, out: Tensor) -> None:
        """Elements from ``start`` on, converted to ``out``'s type."""
        out.copy_(self.values.reshape(-1)[start : start + out.numel()])


def _statistics(name: str, tasks: list[str], given: Mapping[str, Mapping[str, Tensor]]) -> tuple[Held, ...]:
    if not all(name in given.get(task, {}) for task in tasks):
        return ()
    return tuple(Held(f"statistics of {name!r} for {task!r}", given[task][name]) for task in tasks)


@dataclass
class _Collected:
    blocks: list[Tensor] = field(default_factory=list)

    def write(self, data: Tensor) -> None:
        self.blocks.append(data)


def merge_tensors(
    method: str,
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    options: Mapping[str, object] | None = None,
    *,
    overrides: Mapping[str, Mapping[str, object]] | None = None,
    statistics: Mapping[str, Mapping[str, Tensor]] | None = None,
    seed: int = 0,
    threads: int | None = 1,
) -> dict[str, Tensor]:
    """Merge floating-point tensors of any shape by a method of the table; results have the base's names and dtypes.

    ``experts`` maps task names to tensors named and shaped as the base's; ``statistics`` tasks to what was measured on
    their inputs, by tensor name, for methods that need it. ``UsageError`` for an unknown method or option,
    ``RetexError`` for a NaN or infinity.
    """
    row, tasks = find_method(method), sorted(experts)
    check_tasks(row, (options or {}, *(overrides or {}).values()), tasks)
    sink = _Collected()
    steps = [
        Merge(
            View(
                name=name,
                shape=tuple(tensor.shape),
                tasks=tuple(tasks),
                base=Held(f"tensor {name!r} of the base", tensor),
                experts=tuple(Held(f"tensor {name!r} of {task!r}", experts[task][name]) for task in tasks),
                seed=seed,
                statistics=_statistics(name, tasks, statistics or {}),
            ),
            options_for(row, name, options or {}, overrides or {}),
            torch.float32,
        )
        for name, tensor in base.items()
    ]
    stream(row, steps, sink, threads=threads)
    flat = torch.cat(sink.blocks) if sink.blocks else torch.empty(0)
    parts = torch.split(flat, [tensor.numel() for tensor in base.values()])
    return {name: part.view(base[name].shape).to(base[name].dtype) for name, part in zip(base, parts, strict=True)}
