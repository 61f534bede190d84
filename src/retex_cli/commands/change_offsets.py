"""``retex fit-offsets --add`` and ``--remove``: a task joins an offsets file, or leaves it.

Nothing of the other tasks is computed again: their tensors are copied as they are, so their experts need not be at
hand. The new file is written beside the old one and takes its place when it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

import retex_cli
from retex_cli.commands.agreement import Held, held_out_inputs, inputs_recipe
from retex_cli.commands.checks import damaged, of_tensor
from retex_cli.commands.common import Common, shared_out
from retex_cli.commands.fit_offsets import FitOffsetsConfig, fitting_of, merged_digests, weigher_of
from retex_cli.commands.fit_parts import check_parts, parts_recipe
from retex_cli.commands.fit_report import FitOffsetsReport, fitted_row
from retex_cli.commands.fitting import scratch_beside
from retex_cli.commands.offsets_file import OffsetsFile, known, read_files
from retex_cli.commands.offsets_header import (
    COMMON,
    FORMAT,
    TaskRecord,
    header_of,
    open_offsets,
    task_record,
    version_of,
)
from retex_cli.commands.refine import RefineInputs, refine_inputs, refine_recipe
from retex_cli.commands.task_fit import TaskFit, bring, match_experts, source_of_base
from retex_cli.errors import UsageError
from retex_cli.io.artefact import FORMAT_KEY, VERSION_KEY, Stored, check_artefact, stored_in, write_artefact
from retex_cli.io.checkpoint import Checkpoint, open_checkpoint
from retex_cli.io.scratch import as_tensor
from retex_cli.models.device import choose_device
from retex_cli.parallel import thread_count
from retex_cli.progress import Progress

OWN = ("tensors/", "rows/")
"""Starts of the names of tensors that are a task's own."""


@dataclass(frozen=True)
class ChangeOffsetsPlan:
    """The opened file, the records of the tasks that stay, and what joins them; ``merged`` is None if nothing does."""

    config: FitOffsetsConfig
    file: Checkpoint
    records: Mapping[str, TaskRecord]
    merged: OffsetsFile | None
    added: tuple[TaskFit, ...]
    held_out: Mapping[str, Held]
    checks: Mapping[str, str]
    refine: Mapping[str, RefineInputs]

    def report(self) -> FitOffsetsReport:
        return self.report_of({fit.task: fit.row() for fit in self.added}, None)

    def report_of(self, rows: Mapping[str, Mapping[str, object]], size: int | None) -> FitOffsetsReport:
        """The report of these fitted tasks; ``size`` of the written file in bytes."""
        config = self.config
        return FitOffsetsReport(config.output, config.wish.words, rows, size, config.remove, tuple(self.records))

    def kept(self) -> dict[str, Stored]:
        """The tensors of the file that stay, by name: all but those of removed tasks, and files that only they need."""
        wanted = {digest for record in self.records.values() for digest in record.files.values()}
        found = {}
        for name in self.file.tensors:
            section, _, rest = name.partition("/")
            owner = rest.partition("/")[0]
            if owner in wanted if section == "files" else owner not in self.config.remove:
                found[name] = stored_in(self.file, name)
        return found


def plan(config: FitOffsetsConfig) -> ChangeOffsetsPlan:
    """Check names against the file, and experts against the merged checkpoint that it belongs to.

    UsageError for a task to be added that is there already, one to be removed that is not, and when none would be left.
    """
    if config.experts:
        raise UsageError("--expert makes a file, --add and --remove change one", "leave --expert out")
    check_parts(config.without, config.wish, refine=config.refine)
    if config.total_budget is not None:
        raise UsageError(
            "--total-budget is for a whole file, and --add leaves its other tasks as they are", "give --budget"
        )
    file, header = open_offsets(config.output)
    for task in config.remove:
        if task not in header.damaged:
            task_record(config.output, header.records, task)
    for task, why in header.damaged.items():
        if task not in config.remove:
            raise damaged(config.output, task, why)
    left = {task: record for task, record in header.records.items() if task not in config.remove}
    for task in config.add:
        if task in left:
            raise UsageError(
                f"{config.output}: task {task!r} is there already", f"to fit it anew: --remove {task} --add {task}=…"
            )
    if not left and not config.add:
        raise UsageError(
            f"{config.output}: {config.remove[-1]!r} is its last task, and a file without any is none",
            "delete the file instead",
        )
    merged: OffsetsFile | None = None
    added: tuple[TaskFit, ...] = ()
    if config.add:
        merged = OffsetsFile(config.output, open_checkpoint(config.merged))
        added = match_experts(config.add, merged.merged, config.base, config.wish)
    inputs = [path for fit in added for path in fit.expert.files] + ([*merged.merged.files] if merged else [])
    nbytes = sum(info.nbytes for info in file.tensors.values())
    nbytes += sum(fit.most_bytes for fit in added)
    check_artefact(config.output, overwrite=True, inputs=inputs, nbytes=nbytes)
    held_out = held_out_inputs(list(config.add), config.inputs) if config.target is not None else {}
    refine = refine_inputs(list(config.add), config.inputs, config.wish, config.refine)
    return ChangeOffsetsPlan(config, file, left, merged, added, held_out, header.checks, refine)


def run(plan: ChangeOffsetsPlan, progress: Progress) -> FitOffsetsReport:
    """Fit what is added, and write the file anew with all else copied."""
    config = plan.config
    kept = plan.kept()
    tensors: dict[str, Tensor | Stored] = dict(kept)
    records = dict(plan.records)
    checks = {
        name: plan.checks.get(name) or of_tensor(stored.read())  # what a damaged tensor had stays as it is
        for name, stored in kept.items()
        if name.startswith(OWN)
    }
    rows: dict[str, Mapping[str, object]] = {}
    bring([fit.expert for fit in plan.added], progress)
    recipe = _recipe(plan)
    if plan.merged is None:
        return plan.report_of(rows, _write(plan, records, checks, tensors, recipe))
    merged, threads = plan.merged.merged, thread_count(config.threads)
    device = choose_device(config.device, progress)
    plan.merged.check_merged(merged_digests(merged, threads, progress))
    ours = known([read_files(merged.side_files())])
    key = {**recipe, "merged": plan.merged.fingerprint, **source_of_base(plan.added, config.base)}
    none = config.lossless or "common" in config.without
    common = Common(b"" if none else plan.merged.common_data, len(records))
    with scratch_beside(config.output, key, device) as scratch:
        weigher = weigher_of(config, plan.added, plan.refine, merged, device, threads, scratch)
        fitting = fitting_of(
            config, plan.added, plan.held_out, plan.refine, merged, common, weigher, device, threads, scratch, progress
        )
        for fit, fitted in zip(plan.added, fitting.fit(plan.added), strict=True):
            stored = {digest: content for digest, content in fitted.files.items() if digest not in ours}
            new = {f"files/{digest}": as_tensor(content) for digest, content in stored.items()}
            tensors |= {name: tensor for name, tensor in new.items() if name not in tensors}
            tensors |= fitted.tensors
            checks |= fitted.checks
            records[fit.task] = fitted.record
            rows[fit.task] = fitted_row(fit, fitted, stored)
        rows = shared_out(rows, records, len(common.data))
        agreements = {task: {"agreement": row["agreement"]} for task, row in rows.items() if "agreement" in row}
        size = _write(plan, records, checks, tensors, _recipe(plan, agreements))
    return plan.report_of(rows, size)


def _write(
    plan: ChangeOffsetsPlan,
    records: Mapping[str, TaskRecord],
    checks: Mapping[str, str],
    tensors: Mapping[str, Tensor | Stored],
    recipe: Mapping[str, object],
) -> int:
    gone = {FORMAT_KEY, VERSION_KEY} | (set() if any(record.common for record in records.values()) else {COMMON})
    tensors = {name: tensor for name, tensor in tensors.items() if name not in gone}
    metadata = {key: text for key, text in plan.file.metadata.items() if key not in gone}
    metadata |= {**header_of(records, checks), "recipe": json.dumps(recipe, sort_keys=True)}
    return write_artefact(
        plan.config.output, tensors, metadata, format=FORMAT, version=version_of(records), overwrite=True
    )


def _recipe(
    plan: ChangeOffsetsPlan, agreements: Mapping[str, Mapping[str, object]] = MappingProxyType({})
) -> Mapping[str, object]:
    """The file's own recipe: the experts that it now holds, and every change since it was made."""
    old = json.loads(plan.file.metadata.get("recipe", "{}"))
    config, version = plan.config, retex_cli.__version__
    how = {"budget": config.wish.words, "lossless": config.lossless, **inputs_recipe(plan.held_out, config.model)}
    how |= refine_recipe(plan.refine, config.model, config.seed) | parts_recipe(config.without)
    added = {fit.task: {**fit.recipe(), **how, **agreements.get(fit.task, {})} for fit in plan.added}
    experts = {task: entry for task, entry in old.get("experts", {}).items() if task not in config.remove}
    change = {"retex": version, "removed": list(config.remove), "added": sorted(added)}
    return {**old, "experts": {**experts, **added}, "changes": [*old.get("changes", []), change]}
