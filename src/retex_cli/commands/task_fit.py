"""What an offsets file is to get of one expert: how it lies over the merged checkpoint, and within which budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from retex_cli.commands.budget import budget_bytes
from retex_cli.commands.offsets_file import layout_of
from retex_cli.errors import RetexError, UsageError
from retex_cli.io.align import Alignment, align
from retex_cli.io.checkpoint import Checkpoint, adapter_weights, open_checkpoint, open_expert
from retex_cli.io.digests import sha256_file
from retex_cli.progress import Progress

DEFAULT = "0.25%"
SMALLEST = "smallest total"
"""The budget of a lossless fit where none is typed: offsets and correction are smallest together."""
MOST = "8%"
"""And the most that its offsets may take of it."""
LARGEST = "30%"
"""The largest budget that is tried for a target: beyond it a plain copy is the better choice."""


@dataclass(frozen=True)
class Wish:
    """What a file may cost or has to achieve, one of ``budget`` (of each task), ``total`` (of all tasks together), both
    as typed, and ``target`` (share of held-out inputs with the expert's own answer), or none of them."""

    budget: str | None = None
    total: str | None = None
    target: float | None = None
    lossless: bool = False

    def check(self) -> None:
        """UsageError for what cannot be meant together, and for a target that is no share."""
        given = {"--budget": self.budget, "--total-budget": self.total, "--target": self.target}
        named = [flag for flag, value in given.items() if value is not None]
        if len(named) > 1:
            raise UsageError(f"{' and '.join(named)} cannot stand together", "each says what the file may cost")
        if self.target is not None and self.lossless:
            raise UsageError("--target and --lossless cannot stand together", "a lossless expert agrees on every input")
        if self.target is not None and not 0 < self.target <= 1:
            raise UsageError(f"--target {100 * self.target:g} is no share of the inputs", "e.g. --target 99.5")

    @property
    def words(self) -> str:
        """For people and for the recipe."""
        if self.total is not None:
            return f"{self.total} for all tasks"
        if self.target is not None:
            return f"the smallest for {100 * self.target:g} % agreement"
        return self.budget or (SMALLEST if self.lossless else DEFAULT)

    def limit(self, numel: int, all_numel: int) -> int:
        """The most bytes that the offsets of a task may take; ``numel`` of its parameters, and of those of all tasks,
        are shared with the merged checkpoint."""
        if self.total is not None:
            return budget_bytes(self.total, all_numel)
        if self.target is not None:
            return budget_bytes(LARGEST, numel)
        return budget_bytes(MOST if self.words == SMALLEST else self.words, numel)


@dataclass(frozen=True)
class TaskFit:
    """One expert and how its tensors lie over the merged ones; ``asked`` is the wish in words, ``budget`` in bytes, a
    limit only where the fit is to choose it. ``common_bytes``: what the part that tasks have in common took of it."""

    task: str
    expert: Checkpoint
    alignment: Alignment
    asked: str
    budget: int
    lossless: bool = False
    common_bytes: int = 0

    @property
    def most_bytes(self) -> int:
        """What the file needs for the task at most, side files apart."""
        return self.budget + self.task_tensor_bytes + (self.expert.nbytes if self.lossless else 0)

    @property
    def task_tensor_bytes(self) -> int:
        """Bytes of what is stored verbatim: task tensors and rows beyond the merged checkpoint's."""
        whole = sum(self.expert.tensors[name].nbytes for name in self.alignment.task)
        return whole + sum(map(self._extra_rows_bytes, self.alignment.rows))

    def _extra_rows_bytes(self, name: str) -> int:
        info = self.expert.tensors[self.alignment.shared[name]]
        return info.nbytes - info.nbytes // info.shape[0] * self.alignment.rows[name]

    def shared_part(self, name: str, expert: Tensor) -> Tensor:
        """The part of an expert's tensor that lies over the merged tensor ``name``."""
        return expert[: self.alignment.rows[name]] if name in self.alignment.rows else expert

    def row(self) -> dict[str, object]:
        """What a plan can say of the task in the report."""
        return {
            "expert": self.expert.reference,
            "budget_bytes": self.budget,
            "task_tensor_bytes": self.task_tensor_bytes,
            "expert_bytes": self.expert.nbytes,
        }

    @property
    def is_adapter(self) -> bool:
        """Whether the expert is an adapter over a base: the base decides its weights, too."""
        return self.expert.folder is not None and adapter_weights(self.expert.folder) is not None

    def recipe(self) -> dict[str, object]:
        """Where the expert came from, by hash."""
        return source_of(self.expert)


def source_of(checkpoint: Checkpoint) -> dict[str, object]:
    """Where a checkpoint came from, by hash."""
    return {
        "reference": checkpoint.reference,
        "revision": checkpoint.revision,
        "files": file_hashes(checkpoint),
    }


def source_of_base(fits: Sequence[TaskFit], base: str | None) -> dict[str, object]:
    """``{"base": …}`` where an adapter needs it."""
    return {"base": source_of(open_checkpoint(base))} if base and any(fit.is_adapter for fit in fits) else {}


def file_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 of every weight file, by name."""
    return {file.name: sha256_file(file) for file in checkpoint.files}


def bring(checkpoints: Sequence[Checkpoint], progress: Progress) -> None:
    """Download the weights that are not on this machine yet."""
    for checkpoint in checkpoints:
        checkpoint.fetch(progress)


def match_experts(experts: Mapping[str, str], merged: Checkpoint, base: str | None, wish: Wish) -> tuple[TaskFit, ...]:
    """Open every expert by its headers and match it to ``merged``, in the order of task names.

    RetexError for an expert of another shape, and for one that shares nothing; ``base`` is what adapters apply to.
    UsageError for a wish that cannot be meant.
    """
    wish.check()
    floating = [name for name, _ in layout_of(merged)]
    opened = open_checkpoint(base) if base else None
    found: dict[str, tuple[Checkpoint, Alignment, int]] = {}
    for task in sorted(experts):
        reference = experts[task]
        expert = open_checkpoint(reference) if opened is None else open_expert(reference, opened)
        alignment = align(merged, expert, allow_missing=("*",))
        if not alignment.shared:
            raise RetexError(
                f"{reference}: shares no tensor with {merged.reference}", "was it merged into that checkpoint?"
            )
        numel = sum(merged.tensors[name].numel for name in floating if name in alignment.shared)
        found[task] = (expert, alignment, numel)
    together = sum(numel for _, _, numel in found.values())
    return tuple(
        TaskFit(task, expert, alignment, wish.words, wish.limit(numel, together), wish.lossless)
        for task, (expert, alignment, numel) in found.items()
    )
