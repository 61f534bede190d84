"""Experts as running networks, for merges that look at inputs: which inputs, and one task's network at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from retex_cli.errors import RetexError, UsageError
from retex_cli.io.align import Alignment
from retex_cli.io.checkpoint import Checkpoint
from retex_cli.io.inputs import Example, read_rows
from retex_cli.models.network import Network

HELD_OUT = 4
"""One in so many of a task's inputs is kept apart for the choice of a scale, where one is to be chosen."""

LEAST = 8
"""Fewer inputs than this say nothing about a task."""

LARGEST = 1_500_000_000
"""Parameters of the largest network that is run beside a fit: it is held in memory, float32."""


@dataclass(frozen=True)
class TaskInputs:
    """What a merge may look at of one task: unlabelled inputs to measure on, others to choose on, labelled ones."""

    measured: tuple[Example, ...]
    held_out: tuple[Example, ...]
    validation: tuple[Example, ...]


def read_inputs(task: str, path: str | None, samples: int, *, hold_out: bool) -> TaskInputs:
    """The first ``samples`` unlabelled inputs; with ``hold_out`` the last quarter of the file is kept apart.

    UsageError where the task names no inputs, RetexError where the file has too few.
    """
    if path is None:
        raise UsageError(
            f"task {task!r} has no inputs, and every task's are to be looked at",
            f"give --inputs {task}=FILE, or inputs under [tasks.{task}] in retex.toml",
        )
    rows = tuple(read_rows(Path(path)))
    if len(rows) < LEAST:
        raise RetexError(f"{path}: {len(rows)} inputs for task {task!r}, at least {LEAST} are needed", "give more")
    kept = len(rows) - len(rows) // HELD_OUT if hold_out else len(rows)
    return TaskInputs(rows[: min(kept, samples)], rows[kept:], ())


def read_validation(task: str, path: str | None) -> TaskInputs:
    """Labelled rows. UsageError where the task names none, RetexError for a row without a label."""
    if path is None:
        raise UsageError(
            f"task {task!r} has no validation data, and the scale is to be chosen on it",
            f"give --validation {task}=FILE, validation under [tasks.{task}] in retex.toml, or alpha = auto",
        )
    rows = tuple(read_rows(Path(path)))
    bare = [row for row in rows if row.label is None]
    if bare:
        raise RetexError(f"{bare[0].source}: no label", "validation data is labelled: give every row a label")
    return TaskInputs((), (), rows)


@dataclass(frozen=True)
class ExpertModels:
    """Builds one task's network at a time, with the expert's own weights or with merged ones in their place."""

    experts: Mapping[str, Checkpoint]
    alignments: Mapping[str, Alignment]
    device: torch.device
    model: str | None

    def network(self, task: str) -> Network:
        """The network of a task's expert, its weights yet to come. RetexError where the expert has no config."""
        expert = self.experts[task]
        return Network.of(expert.side_files(), expert.reference, self.device, model=self.model)

    def filled(self, task: str) -> Network:
        """The network with the expert's own weights, to be run beside a fit. RetexError as for ``network``, and where
        it is too large."""
        expert = self.experts[task]
        size = sum(info.numel for info in expert.tensors.values())
        if size > LARGEST:
            raise RetexError(f"{expert.reference}: {size:,} parameters are too many to run beside a fit")
        network = self.network(task)
        self.load_expert(network, task)
        return network

    def load_expert(self, network: Network, task: str) -> None:
        """The expert's own weights."""
        expert = self.experts[task]
        network.load(expert.items(), expert.reference)

    def load_merged(self, network: Network, task: str, merged: Mapping[str, Tensor]) -> None:
        """Merged tensors (by the base's names) in place of the expert's shared ones; its head and extra rows stay."""
        expert, alignment = self.experts[task], self.alignments[task]
        ours = {theirs: name for name, theirs in alignment.shared.items() if name in merged}

        def value(name: str) -> Tensor:
            if name not in ours:
                return expert.read(name)
            if (rows := alignment.rows.get(ours[name])) is None:
                return merged[ours[name]]
            extra = expert.read(name)[rows:]
            return torch.cat([merged[ours[name]].to(extra.dtype), extra])

        network.load(((name, value(name)) for name in expert.tensors), f"the merged weights with the head of {task!r}")
