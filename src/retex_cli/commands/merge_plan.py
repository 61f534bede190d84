"""What a merge reads and how it is remembered: tensors on disk as sources, accounts of every tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from retex_cli.errors import RetexError
from retex_cli.io.align import Alignment
from retex_cli.io.checkpoint import Checkpoint
from retex_cli.io.writer import TensorSpec
from retex_cli.merging.engine import Copy, Merge


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a checkpoint as a source of blocks."""

    checkpoint: Checkpoint
    name: str

    @property
    def where(self) -> str:
        """Tensor and file, for messages."""
        return f"{self.checkpoint.tensors[self.name].file}: tensor {self.name!r}"

    def read_into(self, start: int, out: Tensor) -> None:
        """Elements from ``start`` on, converted to ``out``'s type."""
        self.checkpoint.read_into(self.name, start, out)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """What a LoRA adapter adds to the base, as ``left [d_out, r] @ right [r, rest]``; None for ordinary tensors."""
        found = self.checkpoint.low_rank(self.name)
        return None if found is None else (found[0] * found[2], found[1])


@dataclass(frozen=True)
class ExpertAccount:
    """Where every tensor of one expert went: merged, or left to the task. ``rows``: name -> (common, all) rows."""

    reference: str
    revision: str | None
    merged: int
    task_tensors: tuple[str, ...]
    rows: Mapping[str, tuple[int, int]]
    lacks: tuple[str, ...]
    prefix: tuple[str, str]


@dataclass(frozen=True)
class Accounts:
    """Where every tensor of every input went. ``partly``: name -> the tasks it was merged from, where some lack it."""

    base: str
    base_revision: str | None
    total: int
    merged: int
    copied: tuple[str, ...]
    partly: Mapping[str, tuple[str, ...]]
    aliases: Mapping[str, str]
    experts: Mapping[str, ExpertAccount]


def check_accounts(base: Checkpoint, experts: Mapping[str, Checkpoint], alignments: Mapping[str, Alignment]) -> None:
    """Every tensor of every input must have gone somewhere: a tensor that vanished is an error."""
    for task, alignment in alignments.items():
        ours = set(base.tensors) - set(alignment.shared) - set(alignment.kept)
        theirs = set(experts[task].tensors) - set(alignment.shared.values()) - set(alignment.task)
        for lost, checkpoint in ((ours, base), (theirs, experts[task])):
            if lost:
                raise RetexError(
                    f"{checkpoint.reference}: tensor {min(lost)!r} is neither merged nor kept for {task!r}"
                )


def left_out(alignments: Mapping[str, Alignment]) -> list[str]:
    """Notes on what mergekit would merge or stumble over, and retex does not merge: tensors and rows of one task."""
    notes = []
    for task, found in alignments.items():
        rows = [f"rows of {name} from {common} on" for name, common in found.rows.items()]
        names = [*found.task, *rows]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            notes.append(f"{task}: not in the base and not merged: {', '.join(names[:3])}{more}")
    return notes


def account_for(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    alignments: Mapping[str, Alignment],
    steps: Sequence[Merge | Copy],
    specs: Sequence[TensorSpec],
) -> Accounts:
    """The accounts of a plan."""
    merged = [step.view for step in steps if isinstance(step, Merge)]
    return Accounts(
        base=base.reference,
        base_revision=base.revision,
        total=len(steps),
        merged=len(merged),
        copied=tuple(s.name for s, step in zip(specs, steps, strict=True) if isinstance(step, Copy)),
        partly={view.name: view.tasks for view in merged if len(view.tasks) < len(experts)},
        aliases=dict(base.aliases),
        experts={task: _expert_account(experts[task], alignments[task]) for task in experts},
    )


def _expert_account(expert: Checkpoint, alignment: Alignment) -> ExpertAccount:
    rows = {name: (common, expert.tensors[alignment.shared[name]].shape[0]) for name, common in alignment.rows.items()}
    return ExpertAccount(
        reference=expert.reference,
        revision=expert.revision,
        merged=len(set(alignment.shared.values())),
        task_tensors=alignment.task,
        rows=rows,
        lacks=alignment.kept,
        prefix=alignment.prefix,
    )
