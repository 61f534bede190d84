"""``retex fit-offsets``: for every task the offsets that turn the merged checkpoint back into its expert."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import retex_cli
from retex_cli.commands.agreement import Held, Judge, held_out_inputs, inputs_recipe
from retex_cli.commands.common import Common, common_part, shared_out
from retex_cli.commands.expert_models import ExpertModels
from retex_cli.commands.fit_parts import check_parts, parts_recipe
from retex_cli.commands.fit_report import FitOffsetsReport, fitted_row
from retex_cli.commands.fitting import Fitting, lead_of, scratch_beside
from retex_cli.commands.guard import Guard
from retex_cli.commands.offsets_file import fingerprint_of, known, layout_of, read_files
from retex_cli.commands.offsets_header import COMMON, FORMAT, TaskRecord, digest_rows, header_of, version_of
from retex_cli.commands.refine import RefineInputs, Refiner, refine_inputs, refine_recipe
from retex_cli.commands.task_fit import TaskFit, Wish, bring, match_experts, source_of, source_of_base
from retex_cli.commands.weigher import Weigher
from retex_cli.errors import UsageError
from retex_cli.io.artefact import Stored, check_artefact, write_artefact
from retex_cli.io.checkpoint import Checkpoint, open_checkpoint
from retex_cli.io.provenance import checkpoint_digests
from retex_cli.io.scratch import Scratch, as_tensor
from retex_cli.models.device import choose_device
from retex_cli.parallel import thread_count
from retex_cli.progress import Progress


@dataclass(frozen=True)
class FitOffsetsConfig:
    """What to fit. ``base`` is needed only where an expert is a LoRA adapter.

    At most one of ``budget`` (of each task), ``total_budget`` (of all together, shared out by need) and ``target``
    (share of held-out inputs, the last quarter of each task's ``inputs``, on which the recovered expert gives the
    expert's own answer; the smallest budget that does it) is given. With none it is a budget of 0.25%, or with
    ``lossless`` what makes offsets and correction smallest together. ``model`` and ``batch_size`` say how inputs are
    run. ``refine`` trains the offsets on the first of each task's ``inputs``, with ``seed``. ``without`` names parts
    that are left out: see ``fit_parts``. ``add`` (task -> reference) and ``remove`` change the file ``output`` instead
    of making it: see ``change_offsets``.
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
    total_budget: str | None = None
    target: float | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)
    model: str | None = None
    batch_size: int = 32
    refine: bool = False
    without: frozenset[str] = frozenset()
    seed: int = 0

    @property
    def wish(self) -> Wish:
        """What the offsets may cost or have to achieve."""
        return Wish(self.budget, self.total_budget, self.target, self.lossless)


@dataclass(frozen=True)
class FitOffsetsPlan:
    """Everything checked, nothing read but headers."""

    config: FitOffsetsConfig
    merged: Checkpoint
    tasks: tuple[TaskFit, ...]
    held_out: Mapping[str, Held]
    refine: Mapping[str, RefineInputs]

    def report(self) -> FitOffsetsReport:
        rows = {fit.task: fit.row() for fit in self.tasks}
        return FitOffsetsReport(self.config.output, self.config.wish.words, rows, None)


def plan(config: FitOffsetsConfig) -> FitOffsetsPlan:
    """Open everything by its headers and match every expert to the merged checkpoint."""
    if not config.experts:
        raise UsageError("no experts to fit offsets for", "give --expert NAME=REF, or [tasks.NAME] in retex.toml")
    check_parts(config.without, config.wish, refine=config.refine)
    merged = open_checkpoint(config.merged)
    tasks = match_experts(config.experts, merged, config.base, config.wish)
    inputs = [*merged.files, *(file for fit in tasks for file in fit.expert.files)]
    nbytes = sum(fit.most_bytes for fit in tasks)
    check_artefact(config.output, overwrite=config.overwrite, inputs=inputs, nbytes=nbytes)
    held_out = held_out_inputs(list(config.experts), config.inputs) if config.target is not None else {}
    refine = refine_inputs(list(config.experts), config.inputs, config.wish, config.refine)
    return FitOffsetsPlan(config, merged, tasks, held_out, refine)


def run(plan: FitOffsetsPlan, progress: Progress) -> FitOffsetsReport:
    """Fit task by task, tensors of a task side by side, and write one file."""
    config, merged = plan.config, plan.merged
    device, threads = choose_device(config.device, progress), thread_count(config.threads)
    digests, recipe = merged_digests(merged, threads, progress), _recipe(plan, progress)
    tensors: dict[str, Tensor | Stored] = {"digests": digest_rows(digests)}
    records: dict[str, TaskRecord] = {}
    checks: dict[str, str] = {}
    rows: dict[str, Mapping[str, object]] = {}
    ours = known([read_files(merged.side_files())])
    with scratch_beside(config.output, recipe, device) as scratch:
        weigher = weigher_of(config, plan.tasks, plan.refine, merged, device, threads, scratch)
        common = _common(plan, weigher, device, threads, scratch, progress)
        fits = common.paid(plan.tasks, together=config.total_budget is not None)
        fitting = fitting_of(
            config, fits, plan.held_out, plan.refine, merged, common, weigher, device, threads, scratch, progress
        )
        for fit, fitted in zip(fits, fitting.fit(fits), strict=True):
            stored = {digest: content for digest, content in fitted.files.items() if digest not in ours}
            tensors |= {f"files/{digest}": as_tensor(content) for digest, content in stored.items()}
            tensors |= fitted.tensors
            checks |= fitted.checks
            records[fit.task] = fitted.record
            rows[fit.task] = fitted_row(fit, fitted, stored)
        rows = shared_out(rows, records, len(common.data))
        more = {}
        if any(record.common for record in records.values()):
            tensors[COMMON] = as_tensor(common.data)
            more[COMMON] = hashlib.sha256(common.data).hexdigest()
        if fitting.judge is not None:
            recipe["agreement"] = {task: row["agreement"] for task, row in rows.items()}
        metadata = {
            **header_of(records, checks),
            **more,
            "merged": fingerprint_of(merged, digests),
            "recipe": json.dumps(recipe, sort_keys=True),
        }
        size = write_artefact(
            config.output, tensors, metadata, format=FORMAT, version=version_of(records), overwrite=config.overwrite
        )
    return FitOffsetsReport(config.output, config.wish.words, rows, size)


def fitting_of(
    config: FitOffsetsConfig, fits: Sequence[TaskFit], held_out: Mapping[str, Held], refine: Mapping[str, RefineInputs],
    merged: Checkpoint, common: Common, weigher: Weigher, device: torch.device, threads: int, scratch: Scratch,
    progress: Progress,
) -> Fitting:  # fmt: skip
    """How ``fits`` are to be fitted, with all that ``config`` asks for beside a budget and what they have in common."""
    models, without, corrected = weigher.models, config.without, common.over(merged)
    judge = Judge.of(config.target, models, held_out, corrected, config.batch_size, threads)
    refiner = Refiner.of(models, refine, corrected, config.seed, threads, without)
    guard = None if judge else Guard.of(fits, weigher, corrected, progress, without, merged)
    together = config.total_budget is not None
    parts = (judge, refiner, guard, without, common)
    return Fitting(corrected, device, threads, scratch, progress, weigher, together, *parts)


def weigher_of(
    config: FitOffsetsConfig, fits: Sequence[TaskFit], refine: Mapping[str, RefineInputs], merged: Checkpoint,
    device: torch.device, threads: int, scratch: Scratch,
) -> Weigher:  # fmt: skip
    """What says by how much errors count in these experts, asked the inputs that they are refined on."""
    experts, alignments = {fit.task: fit.expert for fit in fits}, {fit.task: fit.alignment for fit in fits}
    models = ExpertModels(experts, alignments, device, config.model)
    inputs = {task: each.rows for task, each in refine.items()}
    return Weigher(models, layout_of(merged), inputs, threads, scratch, config.without)


def _common(
    plan: FitOffsetsPlan, weigher: Weigher, device: torch.device, threads: int, scratch: Scratch, progress: Progress
) -> Common:
    """What the tasks' offsets have in common; not looked for where budgets are an outcome and not given."""
    config, fits = plan.config, plan.tasks
    if len(fits) < 2 or config.lossless or config.target is not None or "common" in config.without:
        return Common(b"", len(fits))
    together, lead = config.total_budget is not None, lead_of(config.without)
    return common_part(fits, plan.merged, weigher, device, threads, scratch, progress, together=together, lead=lead)


def merged_digests(merged: Checkpoint, threads: int, progress: Progress) -> dict[str, bytes]:
    """SHA-256 of every merged tensor."""
    progress.start("reading the merged checkpoint", 1)
    digests = checkpoint_digests(merged, threads)
    progress.advance()
    return digests


def _recipe(plan: FitOffsetsPlan, progress: Progress) -> dict[str, object]:
    config, merged = plan.config, plan.merged
    bring([merged, *(fit.expert for fit in plan.tasks)], progress)
    return {
        "command": "fit-offsets",
        "retex": retex_cli.__version__,
        "budget": config.wish.words,
        "lossless": config.lossless,
        "merged": source_of(merged),
        "experts": {fit.task: fit.recipe() for fit in plan.tasks},
        **source_of_base(plan.tasks, config.base),
        **inputs_recipe(plan.held_out, config.model),
        **refine_recipe(plan.refine, config.model, config.seed),
        **parts_recipe(config.without),
    }
