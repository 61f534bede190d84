"""``retex fit-offsets``: for every task the offsets that turn the merged checkpoint back into its expert."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

import retex_cli
from retex_cli.commands.fitting import FittedTask, Fitting, as_tensor, scratch_beside
from retex_cli.commands.offsets_file import (
    FORMAT,
    TaskRecord,
    digest_rows,
    fingerprint_of,
    known,
    read_files,
    tasks_json,
    version_of,
)
from retex_cli.commands.report import Json, Table
from retex_cli.commands.task_fit import TaskFit, asked_budget, bring, match_experts, source_of, source_of_base
from retex_cli.errors import UsageError
from retex_cli.io.artefact import Stored, check_artefact, write_artefact
from retex_cli.io.checkpoint import Checkpoint, open_checkpoint
from retex_cli.io.provenance import checkpoint_digests
from retex_cli.models.device import choose_device
from retex_cli.parallel import thread_count
from retex_cli.progress import Progress


@dataclass(frozen=True)
class FitOffsetsConfig:
    """What to fit. ``base`` is needed only where an expert is a LoRA adapter.

    ``budget`` None is 0.25%, or with ``lossless`` what makes offsets and correction smallest together.
    ``add`` (task -> reference) and ``remove`` change the file ``output`` instead of making it: see ``change_offsets``.
    """

    merged: str
    experts: Mapping[str, str]
    output: str
    budget: str | None = None
    base: str | None = None
    device: str = "auto"
    threads: int | None = None
    overwrite: bool = False
    add: Mapping[str, str] = field(default_factory=dict)
    remove: tuple[str, ...] = ()
    lossless: bool = False

    @property
    def asked(self) -> str:
        """The budget in words."""
        return asked_budget(self.budget, self.lossless)


@dataclass(frozen=True)
class FitOffsetsPlan:
    """Everything checked, nothing read but headers."""

    config: FitOffsetsConfig
    merged: Checkpoint
    tasks: tuple[TaskFit, ...]

    def report(self) -> FitOffsetsReport:
        rows = {fit.task: fit.row() for fit in self.tasks}
        return FitOffsetsReport(self.config.output, self.config.asked, rows, None)


@dataclass(frozen=True)
class FitOffsetsReport:
    """``{"output", "budget", "bytes", "tasks": {name: {"expert", "budget_bytes", "offset_bytes", "correction_bytes",
    "task_tensor_bytes", "side_file_bytes", "expert_bytes"}}, "removed": [task], "kept": [task]}``; a plan has neither
    ``bytes`` nor those of offsets, correction and side files. ``tasks`` are those that were fitted, ``kept`` those that
    stayed as they were.
    """

    output: str
    budget: str
    rows: Mapping[str, Mapping[str, object]]
    written: int | None
    removed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    def to_json(self) -> Json:
        return {
            "output": self.output,
            "budget": self.budget,
            "bytes": self.written,
            "tasks": self.rows,
            "removed": list(self.removed),
            "kept": list(self.kept),
        }

    def tables(self) -> list[Table]:
        exact = any(row.get("correction_bytes") for row in self.rows.values())
        columns = ("task", "offsets", *(["correction"] if exact else []), "task tensors", "side files", "expert")
        rows = []
        for task, row in self.rows.items():
            sizes = [row.get("offset_bytes", row["budget_bytes"]), *([row["correction_bytes"]] if exact else [])]
            share = f"{100 * sum(int(str(size)) for size in sizes) / int(str(row['expert_bytes'])):.3f} %"
            sizes += [row["task_tensor_bytes"], row.get("side_file_bytes", "-"), row["expert_bytes"]]
            rows.append((task, *(f"{size:,}" if isinstance(size, int) else str(size) for size in sizes), share))
        share_of = "offsets + correction / expert" if exact else "offsets / expert"
        if not rows:
            return []
        return [Table("bytes per task" if self.written else "plan: bytes per task", (*columns, share_of), tuple(rows))]

    def lines(self) -> list[str]:
        changes = [f"removed {', '.join(self.removed)}"] if self.removed else []
        if self.kept:
            changes.append(f"{', '.join(self.kept)}: as before, byte for byte")
        if self.rows:
            changes.append(f"budget of each task: {self.budget}")
        if self.written is None:
            return changes
        return [*changes, f"wrote {self.output}: {self.written:,} bytes for {len(self.rows) + len(self.kept)} tasks"]


def plan(config: FitOffsetsConfig) -> FitOffsetsPlan:
    """Open everything by its headers and match every expert to the merged checkpoint."""
    if not config.experts:
        raise UsageError("no experts to fit offsets for", "give --expert NAME=REF, or [tasks.NAME] in retex.toml")
    merged = open_checkpoint(config.merged)
    tasks = match_experts(config.experts, merged, config.base, config.budget, config.lossless)
    inputs = [*merged.files, *(file for fit in tasks for file in fit.expert.files)]
    nbytes = sum(fit.most_bytes for fit in tasks)
    check_artefact(config.output, overwrite=config.overwrite, inputs=inputs, nbytes=nbytes)
    return FitOffsetsPlan(config, merged, tasks)


def run(plan: FitOffsetsPlan, progress: Progress) -> FitOffsetsReport:
    """Fit task by task, tensors of a task side by side, and write one file."""
    config, merged = plan.config, plan.merged
    device, threads = choose_device(config.device, progress), thread_count(config.threads)
    digests, recipe = merged_digests(merged, threads, progress), _recipe(plan, progress)
    tensors: dict[str, Tensor | Stored] = {"digests": digest_rows(digests)}
    records: dict[str, TaskRecord] = {}
    rows: dict[str, Mapping[str, object]] = {}
    ours = known([read_files(merged.side_files())])
    with scratch_beside(config.output, recipe, device) as scratch:
        fitting = Fitting(merged, device, threads, scratch, progress)
        for fit, fitted in zip(plan.tasks, fitting.fit(plan.tasks), strict=True):
            stored = {digest: content for digest, content in fitted.files.items() if digest not in ours}
            tensors |= {f"files/{digest}": as_tensor(content) for digest, content in stored.items()}
            tensors |= fitted.tensors
            records[fit.task] = fitted.record
            rows[fit.task] = fitted_row(fit, fitted, stored)
        metadata = {
            "tasks": tasks_json(records),
            "merged": fingerprint_of(merged, digests),
            "recipe": json.dumps(recipe, sort_keys=True),
        }
        size = write_artefact(
            config.output, tensors, metadata, format=FORMAT, version=version_of(records), overwrite=config.overwrite
        )
    return FitOffsetsReport(config.output, config.asked, rows, size)


def merged_digests(merged: Checkpoint, threads: int, progress: Progress) -> dict[str, bytes]:
    """SHA-256 of every merged tensor."""
    progress.start("reading the merged checkpoint", 1)
    digests = checkpoint_digests(merged, threads)
    progress.advance()
    return digests


def fitted_row(fit: TaskFit, fitted: FittedTask, stored: Mapping[str, bytes]) -> dict[str, object]:
    """One task of the report; ``stored``: its side files that the merged folder does not have, by SHA-256."""
    return {
        **fit.row(),
        "budget_bytes": fitted.record.budget_bytes,
        "offset_bytes": fitted.record.offset_bytes,
        "correction_bytes": fitted.record.correction_bytes,
        "side_file_bytes": sum(map(len, stored.values())),
        "expert_bytes": fitted.record.expert_bytes,
    }


def _recipe(plan: FitOffsetsPlan, progress: Progress) -> Mapping[str, object]:
    config, merged = plan.config, plan.merged
    bring([merged, *(fit.expert for fit in plan.tasks)], progress)
    return {
        "command": "fit-offsets",
        "retex": retex_cli.__version__,
        "budget": config.asked,
        "lossless": config.lossless,
        "merged": source_of(merged),
        "experts": {fit.task: fit.recipe() for fit in plan.tasks},
        **source_of_base(plan.tasks, config.base),
    }
