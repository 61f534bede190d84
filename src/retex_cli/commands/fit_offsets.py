"""``retex fit-offsets``: for every task the offsets that turn the merged checkpoint back into its expert."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import retex_cli
from retex_cli.commands.budget import budget_bytes
from retex_cli.commands.offsets_file import (
    FORMAT,
    VERSION,
    Layout,
    TaskRecord,
    digest_rows,
    known,
    layout_of,
    naming,
    read_files,
    tasks_json,
    usual_dtype,
)
from retex_cli.commands.report import Json, Table
from retex_cli.errors import RetexError, UsageError
from retex_cli.io.align import Alignment, align
from retex_cli.io.artefact import check_artefact, write_artefact
from retex_cli.io.checkpoint import Checkpoint, open_checkpoint, open_expert
from retex_cli.io.digests import sha256_file
from retex_cli.io.provenance import checkpoint_digests, fingerprint, tensor_digest
from retex_cli.models.device import choose_device
from retex_cli.offsets.domain import to_domain
from retex_cli.offsets.fit import BudgetTooSmall, OffsetFitter, Prepared
from retex_cli.parallel import ordered_map, thread_count
from retex_cli.progress import Progress


@dataclass(frozen=True)
class FitOffsetsConfig:
    """What to fit. ``base`` is needed only where an expert is a LoRA adapter."""

    merged: str
    experts: Mapping[str, str]
    output: str
    budget: str = "0.25%"
    base: str | None = None
    device: str = "auto"
    threads: int | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class TaskFit:
    """One expert and how its tensors lie over the merged ones; ``budget`` in bytes."""

    task: str
    expert: Checkpoint
    alignment: Alignment
    budget: int


@dataclass(frozen=True)
class FitOffsetsPlan:
    """Everything checked, nothing read but headers."""

    config: FitOffsetsConfig
    merged: Checkpoint
    layout: Layout
    tasks: tuple[TaskFit, ...]

    def report(self) -> FitOffsetsReport:
        rows = {
            fit.task: {
                "expert": fit.expert.reference,
                "budget_bytes": fit.budget,
                "task_tensor_bytes": _task_tensor_bytes(fit),
                "expert_bytes": fit.expert.nbytes,
            }
            for fit in self.tasks
        }
        return FitOffsetsReport(self.config.output, self.config.budget, rows, None)


@dataclass(frozen=True)
class FitOffsetsReport:
    """``{"output", "budget", "bytes", "tasks": {name: {"expert", "budget_bytes", "offset_bytes", "task_tensor_bytes",
    "side_file_bytes", "expert_bytes"}}}``; a plan has no ``offset_bytes`` and no ``bytes``."""

    output: str
    budget: str
    rows: Mapping[str, Mapping[str, object]]
    written: int | None

    def to_json(self) -> Json:
        return {"output": self.output, "budget": self.budget, "bytes": self.written, "tasks": self.rows}

    def tables(self) -> list[Table]:
        columns = ("task", "offsets", "task tensors", "side files", "expert", "offsets / expert")
        rows = []
        for task, row in self.rows.items():
            offsets, expert = row.get("offset_bytes", row["budget_bytes"]), row["expert_bytes"]
            share = f"{100 * int(str(offsets)) / int(str(expert)):.3f} %"
            sizes = (offsets, row["task_tensor_bytes"], row.get("side_file_bytes", "-"), expert)
            rows.append((task, *(f"{size:,}" if isinstance(size, int) else str(size) for size in sizes), share))
        return [Table("bytes per task" if self.written else "plan: bytes per task", columns, tuple(rows))]

    def lines(self) -> list[str]:
        if self.written is None:
            return []
        return [f"wrote {self.output}: {self.written:,} bytes for {len(self.rows)} tasks"]


def plan(config: FitOffsetsConfig) -> FitOffsetsPlan:
    """Open everything by its headers and match every expert to the merged checkpoint."""
    if not config.experts:
        raise UsageError("no experts to fit offsets for", "give --expert NAME=REF, or [tasks.NAME] in retex.toml")
    merged = open_checkpoint(config.merged)
    base = open_checkpoint(config.base) if config.base else None
    layout = layout_of(merged)
    tasks = []
    for task in sorted(config.experts):
        reference = config.experts[task]
        expert = open_checkpoint(reference) if base is None else open_expert(reference, base)
        alignment = align(merged, expert, allow_missing=("*",))
        if not alignment.shared:
            raise RetexError(
                f"{reference}: shares no tensor with {config.merged}", "was it merged into that checkpoint?"
            )
        numel = sum(merged.tensors[name].numel for name, _ in layout if name in alignment.shared)
        tasks.append(TaskFit(task, expert, alignment, budget_bytes(config.budget, numel)))
    inputs = [*merged.files, *(file for fit in tasks for file in fit.expert.files)]
    nbytes = sum(fit.budget + _task_tensor_bytes(fit) for fit in tasks)
    check_artefact(config.output, overwrite=config.overwrite, inputs=inputs, nbytes=nbytes)
    return FitOffsetsPlan(config, merged, layout, tuple(tasks))


def _task_tensor_bytes(fit: TaskFit) -> int:
    whole = sum(fit.expert.tensors[name].nbytes for name in fit.alignment.task)
    return whole + sum(_extra_rows_bytes(fit, name) for name in fit.alignment.rows)


def _extra_rows_bytes(fit: TaskFit, name: str) -> int:
    info = fit.expert.tensors[fit.alignment.shared[name]]
    return info.nbytes - info.nbytes // info.shape[0] * fit.alignment.rows[name]


def run(plan: FitOffsetsPlan, progress: Progress) -> FitOffsetsReport:
    """Fit task by task, tensors of a task side by side, and write one file."""
    config, merged = plan.config, plan.merged
    device = choose_device(config.device, progress)
    threads = thread_count(config.threads)
    progress.start("reading the merged checkpoint", 1)
    digests = checkpoint_digests(merged, threads)
    progress.advance()
    tensors: dict[str, Tensor] = {"digests": digest_rows(digests)}
    records: dict[str, TaskRecord] = {}
    rows: dict[str, Mapping[str, object]] = {}
    ours = known([read_files(merged.side_files())])
    for fit in plan.tasks:
        data, expert_digests = _fit_task(plan, fit, device, threads, progress)
        files = read_files(fit.expert.side_files())
        stored = {digest: content for digest, content in known([files]).items() if digest not in ours}
        tensors |= {f"files/{digest}": _bytes(content) for digest, content in stored.items()}
        tensors |= _task_tensors(fit)
        tensors[f"offsets/{fit.task}"] = _bytes(data)
        records[fit.task] = _record(fit, data, files, expert_digests)
        rows[fit.task] = {
            "expert": fit.expert.reference,
            "budget_bytes": fit.budget,
            "offset_bytes": len(data),
            "task_tensor_bytes": _task_tensor_bytes(fit),
            "side_file_bytes": sum(map(len, stored.values())),
            "expert_bytes": records[fit.task].expert_bytes,
        }
    metadata = {
        "tasks": tasks_json(records),
        "merged": fingerprint({name: (info.dtype, info.shape, digests[name]) for name, info in merged.tensors.items()}),
        "recipe": json.dumps(_recipe(plan), sort_keys=True),
    }
    size = write_artefact(config.output, tensors, metadata, format=FORMAT, version=VERSION, overwrite=config.overwrite)
    return FitOffsetsReport(config.output, config.budget, rows, size)


def _fit_task(
    plan: FitOffsetsPlan, fit: TaskFit, device: torch.device, threads: int, progress: Progress
) -> tuple[bytes, dict[str, bytes]]:
    """Coded offsets, and the SHA-256 of every tensor of the expert."""
    fitter = OffsetFitter(plan.layout, fit.budget)
    merged_names = {expert: name for name, expert in fit.alignment.shared.items()}
    names = list(fit.expert.tensors)
    progress.start(f"fitting {fit.task}", len(names))

    def prepare(name: str) -> tuple[bytes, Prepared | None]:
        tensor = fit.expert.read(name)
        digest = tensor_digest(tensor)
        if name not in merged_names or not tensor.is_floating_point():
            return digest, None
        ours = merged_names[name]
        reference = plan.merged.read(ours)
        shared = tensor[: len(reference)] if ours in fit.alignment.rows else tensor
        delta = to_domain(ours, shared.to(device)) - to_domain(ours, reference.to(device))
        if not bool(delta.isfinite().all()):
            raise RetexError(
                f"{fit.expert.tensors[name].file}: tensor {name!r} of task {fit.task!r} holds NaN or infinity",
                "repair the expert or leave it out",
            )
        return digest, fitter.prepare(delta)

    digests = {}
    for name, (digest, prepared) in zip(names, ordered_map(prepare, names, threads), strict=True):
        digests[name] = digest
        if prepared is not None:
            fitter.update(merged_names[name], prepared)
        progress.advance()
    try:
        return fitter.finish(), digests
    except BudgetTooSmall as error:
        raise RetexError(
            f"the budget {plan.config.budget!r} is {fit.budget:,} bytes for task {fit.task!r}; the least that holds "
            f"anything is {error.minimum:,} bytes",
            f"give --budget {error.minimum} or more",
        ) from error


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _task_tensors(fit: TaskFit) -> dict[str, Tensor]:
    tensors = {f"tensors/{fit.task}/{name}": fit.expert.read(name) for name in fit.alignment.task}
    for name, count in fit.alignment.rows.items():
        expert_name = fit.alignment.shared[name]
        tensors[f"rows/{fit.task}/{expert_name}"] = fit.expert.read(expert_name)[count:].clone()
    return tensors


def _record(fit: TaskFit, data: bytes, files: Mapping[str, bytes], digests: Mapping[str, bytes]) -> TaskRecord:
    infos = fit.expert.tensors
    dtype, dtypes = usual_dtype({name: infos[name].dtype for name in fit.alignment.shared.values()})
    return TaskRecord(
        expert=fit.expert.reference,
        revision=fit.expert.revision,
        fingerprint=fingerprint({name: (info.dtype, info.shape, digests[name]) for name, info in infos.items()}),
        expert_bytes=sum(file.stat().st_size for file in fit.expert.files),
        offset_bytes=len(data),
        budget_bytes=fit.budget,
        checksum=hashlib.sha256(data).hexdigest(),
        prefix=fit.alignment.prefix,
        names=naming(fit.alignment),
        absent=fit.alignment.kept,
        dtype=dtype,
        dtypes=dtypes,
        rows=fit.alignment.rows,
        files={name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    )


def _recipe(plan: FitOffsetsPlan) -> Mapping[str, object]:
    return {
        "command": "fit-offsets",
        "retex": retex_cli.__version__,
        "budget": plan.config.budget,
        "merged": {"reference": plan.merged.reference, "revision": plan.merged.revision, "files": _hashes(plan.merged)},
        "experts": {
            fit.task: {
                "reference": fit.expert.reference,
                "revision": fit.expert.revision,
                "files": _hashes(fit.expert),
            }
            for fit in plan.tasks
        },
    }


def _hashes(checkpoint: Checkpoint) -> Mapping[str, str]:
    return {file.name: sha256_file(file) for file in checkpoint.files}
