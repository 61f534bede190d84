"""What a rival is to the harness: files out of the experts, experts out of the files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

Tensors = Mapping[str, Tensor]
"""Shared tensors of one checkpoint by the merged checkpoint's names, in its order: float32."""


@dataclass(frozen=True)
class Known:
    """What is at hand when files are read: the merged checkpoint and, for those that build on it, the base."""

    merged: Tensors
    base: Tensors


@dataclass(frozen=True)
class Case:
    """What a rival may look at while it writes.

    ``grams``: called when a rival needs them; task -> weight name -> Gram matrix ``X^T X`` of the layer's inputs in
    the expert.
    """

    known: Known
    experts: Mapping[str, Tensors]
    grams: Callable[[], Mapping[str, Mapping[str, Tensor]]]


@dataclass(frozen=True)
class Files:
    """Bytes per task, and of what all tasks share."""

    tasks: Mapping[str, bytes]
    shared: bytes = field(default=b"")


@dataclass(frozen=True)
class Form:
    """One row: a rival at one size.

    ``stands_in``: its shared file takes the place of the merged checkpoint, so it is no cost of the tasks. ``note``:
    in what this is not the published form, or favours it.
    """

    name: str
    size: str
    encode: Callable[[Case], Files]
    decode: Callable[[Known, Files, str], dict[str, Tensor]]
    stands_in: bool = False
    note: str = ""

    def bytes_per_task(self, files: Files) -> float:
        """Mean over tasks, with each task's part of what they share."""
        shared = 0 if self.stands_in else len(files.shared)
        return (sum(map(len, files.tasks.values())) + shared) / len(files.tasks)


def over_merged(
    name: str, size: str, encode: Callable[[Tensors, Tensors], bytes],
    decode: Callable[[Tensors, bytes], dict[str, Tensor]], note: str = "",
) -> Form:  # fmt: skip
    """A rival that looks at one expert and the merged checkpoint."""
    return Form(
        name,
        size,
        lambda case: Files({task: encode(case.known.merged, expert) for task, expert in case.experts.items()}),
        lambda known, files, task: decode(known.merged, files.tasks[task]),
        note=note,
    )


def over_base(
    name: str, size: str, encode: Callable[[Tensors, Tensors], bytes],
    decode: Callable[[Tensors, bytes], dict[str, Tensor]], note: str = "",
) -> Form:  # fmt: skip
    """A rival that looks at one expert and the base."""
    return Form(
        name,
        size,
        lambda case: Files({task: encode(case.known.base, expert) for task, expert in case.experts.items()}),
        lambda known, files, task: decode(known.base, files.tasks[task]),
        note=note,
    )
