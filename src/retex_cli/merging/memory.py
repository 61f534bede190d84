"""The same methods on tensors that are already in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from retex_cli.merging.budget import DEFAULT
from retex_cli.merging.engine import Copy, Merge, stream
from retex_cli.merging.table import Method, check_tasks, find_method, options_for
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


class Memory:
    """A sink that keeps merged tensors, float32, in the order of the steps."""

    def __init__(self, steps: Sequence[Merge]) -> None:
        self.tensors = [torch.empty(step.view.numel) for step in steps]
        self._place = self._done = 0

    def write(self, data: Tensor) -> None:
        """The next elements."""
        while len(data):
            target = self.tensors[self._place][self._done :]
            count = min(len(target), len(data))
            target[:count] = data[:count]
            data, self._done = data[count:], self._done + count
            if count == len(target):
                self._place, self._done = self._place + 1, 0


def merge_steps(
    method: Method, steps: Sequence[Merge | Copy], *, threads: int = 1, budget: int = DEFAULT
) -> dict[str, Tensor]:
    """The merged tensors by name, in float32 and whole; what is copied is left out."""
    merges = [replace(step, dtype=torch.float32) for step in steps if isinstance(step, Merge)]
    sink = Memory(merges)
    stream(method, merges, sink, threads=threads, budget=budget)
    return {s.view.name: t.view(s.view.shape) for s, t in zip(merges, sink.tensors, strict=True)}


def merge_tensors(
    method: str,
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    options: Mapping[str, object] | None = None,
    *,
    overrides: Mapping[str, Mapping[str, object]] | None = None,
    statistics: Mapping[str, Mapping[str, Tensor]] | None = None,
    seed: int = 0,
    threads: int = 1,
) -> dict[str, Tensor]:
    """Merge floating-point tensors of any shape by a method of the table; results have the base's names and dtypes.

    ``experts`` maps task names to tensors named and shaped as the base's; ``statistics`` tasks to what was measured on
    their inputs, by tensor name, for methods that need it. ``UsageError`` for an unknown method or option,
    ``RetexError`` for a NaN or infinity.
    """
    row, tasks = find_method(method), sorted(experts)
    check_tasks(row, (options or {}, *(overrides or {}).values()), tasks)
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
    merged = merge_steps(row, steps, threads=threads)
    return {name: merged[name].to(tensor.dtype) for name, tensor in base.items()}
