"""``retex merge``: several experts of one base become one checkpoint of the base's shape.

``plan`` opens every input by its header, matches tensors and refuses what cannot be meant; ``run`` streams tensors
through the method into the output. Memory follows the block at hand, not the model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from retex_cli.commands.expert_models import ExpertModels
from retex_cli.commands.merge_config import from_mergekit
from retex_cli.commands.merge_inputs import AVERAGE, InputsConfig, InputsPlan, Prepared, plan_inputs, prepare
from retex_cli.commands.merge_plan import Stored, account_for, check_accounts, left_out
from retex_cli.commands.merge_recipe import Hashing, Origin, Recipe, config_with_dtype, placeholder
from retex_cli.commands.merge_report import MergeReport, model_card
from retex_cli.errors import RetexError, UsageError
from retex_cli.io.align import Alignment, align
from retex_cli.io.checkpoint import Checkpoint, open_checkpoint, open_expert
from retex_cli.io.dtypes import parse_dtype
from retex_cli.io.writer import Output, TensorSpec, Writer, open_output
from retex_cli.merging import budget, related
from retex_cli.merging.engine import Copy, Merge, stream
from retex_cli.merging.options import plain
from retex_cli.merging.table import Method, check_tasks, find_method, options_for, overridden
from retex_cli.merging.view import View
from retex_cli.models.device import choose_device
from retex_cli.parallel import one_thread_each, thread_count
from retex_cli.progress import Progress, Silent


@dataclass(frozen=True)
class MergeConfig:
    """What to merge, how, and where to.

    ``experts`` maps task names to references (file, folder, Hub id or LoRA adapter). ``options`` are the method's,
    ``overrides`` maps globs over the base's tensor names to options that differ there. ``max_memory`` bounds the bytes
    of the tensors held at once. ``allow_missing`` are globs of base parameters that an expert may lack,
    ``allow_unrelated`` lets experts through that were not tuned from this base. ``config`` is a mergekit file that says
    all this in place of ``base``, ``experts``, ``method``, ``options`` and ``overrides``. ``inputs`` and ``validation``
    map task names to files, for merges that measure on them (``samples`` inputs of a task; see ``merge_inputs``).
    """

    base: str
    experts: Mapping[str, str]
    output: str
    method: str = "average"
    options: Mapping[str, object] = field(default_factory=dict)
    overrides: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    dtype: str | None = None
    max_shard_size: int = 5_000_000_000
    max_memory: int | None = None
    allow_missing: tuple[str, ...] = ()
    allow_unrelated: bool = False
    inputs: Mapping[str, str] = field(default_factory=dict)
    validation: Mapping[str, str] = field(default_factory=dict)
    samples: int | None = None
    batchnorm: str = AVERAGE
    model: str | None = None
    batch_size: int = 32
    device: str = "auto"
    threads: int | None = None
    seed: int = 0
    overwrite: bool = False
    config: str | None = None


@dataclass(frozen=True)
class MergePlan:
    """Every input opened and matched; nothing written."""

    config: MergeConfig
    method: Method
    base: Checkpoint
    experts: Mapping[str, Checkpoint]
    alignments: Mapping[str, Alignment]
    steps: tuple[Merge | Copy, ...]
    specs: tuple[TensorSpec, ...]
    output: Output
    budget: int
    inputs: InputsPlan
    origin: Origin | None = None

    def report(self) -> MergeReport:
        """What would happen, from the headers."""
        return MergeReport(
            output=str(self.output),
            method=self.method,
            options=plain(self.method.resolve(self.config.options), list(self.experts)),
            overrides=_plain_overrides(self.config, self.method),
            origin=self.origin,
            seed=self.config.seed,
            accounts=account_for(self.base, self.experts, self.alignments, self.steps, self.specs),
            bytes_in=sum(checkpoint.nbytes for checkpoint in (self.base, *self.experts.values())),
            bytes_out=sum(spec.nbytes for spec in self.specs),
            peak_memory=self.budget,
        )


def plan(config: MergeConfig) -> MergePlan:
    """Open, match, check. ``UsageError`` for what cannot be meant, ``RetexError`` for inputs that do not fit."""
    origin = None
    if config.config is not None:
        config, origin = from_mergekit(config.config, config)
    method = find_method(config.method)
    _check_tasks(config, method)
    check_tasks(method, (config.options, *config.overrides.values()), config.experts)
    device = choose_device(config.device, Silent())
    output = Output.parse(config.output)
    dtype = parse_dtype(config.dtype) if config.dtype else None
    base = open_checkpoint(config.base)
    experts = {task: open_expert(config.experts[task], base) for task in sorted(config.experts)}
    alignments = {task: align(base, e, allow_missing=config.allow_missing) for task, e in experts.items()}
    check_accounts(base, experts, alignments)
    if origin is not None:
        origin = replace(origin, notes=(*origin.notes, *left_out(alignments)))
    specs = tuple(
        TensorSpec(name, dtype if dtype and info.dtype.is_floating_point else info.dtype, info.shape)
        for name, info in base.tensors.items()
    )
    steps = tuple(_step(config, method, base, experts, alignments, spec, device) for spec in specs)
    merged = [step.view.name for step in steps if isinstance(step, Merge)]
    _check_overrides(config, method, merged)
    wanted = InputsConfig(config.inputs, config.validation, config.samples, config.batchnorm, config.batch_size)
    data = plan_inputs(wanted, method, list(experts), config.options, config.overrides, merged)
    inputs = [path for checkpoint in (base, *experts.values()) for path in checkpoint.files]
    output.check(config.overwrite, inputs, sum(spec.nbytes for spec in specs))
    room = _budget(config, method, steps)
    return MergePlan(config, method, base, experts, alignments, steps, specs, output, room, data, origin)


def run(plan: MergePlan, progress: Progress | None = None) -> MergeReport:
    """Merge as planned. Nothing appears at the output unless everything went well."""
    progress = progress or Silent()
    began = time.monotonic()
    _announce(plan, progress)
    with ExitStack() as stack:
        stack.enter_context(one_thread_each())
        for checkpoint in (plan.base, *plan.experts.values()):
            stack.callback(checkpoint.close)
            checkpoint.fetch(progress)
        ratios = _check_related(plan)
        hashing = Hashing(_files(plan), plan.config.threads)
        stack.callback(hashing.close)
        prepared = _prepare(plan, stack, progress)
        recipe = _recipe(plan, prepared, hashing.all() if plan.output.kind == "stdout" else None)
        writer = stack.enter_context(
            open_output(
                plan.output,
                plan.specs,
                metadata=recipe.metadata(),
                overwrite=plan.config.overwrite,
                max_shard_size=plan.config.max_shard_size,
                side_files=_side_files(plan),
            )
        )
        _stream(plan, prepared, writer, progress)
        if plan.output.kind != "stdout":
            recipe = _sign(plan, prepared, writer, recipe, hashing.all())
    return plan.report().finished(time.monotonic() - began, ratios, recipe.hashes, prepared.found)


def _check_tasks(config: MergeConfig, method: Method) -> None:
    if not config.experts:
        raise UsageError("there is no expert to merge", "give some: --expert NAME=REF, or [tasks.NAME] in retex.toml")
    if method.needs == "two experts" and len(config.experts) != 2:
        names = ", ".join(sorted(config.experts))
        raise UsageError(
            f"method {method.name!r} merges two experts, {len(config.experts)} are given: {names}",
            "choose two, or a method that takes any number: average, ties",
        )


def _plain_overrides(config: MergeConfig, method: Method) -> dict[str, dict[str, object]]:
    """Per glob the options that differ there, checked, as JSON has them."""
    return {
        glob: plain({name: method.resolve(options)[name] for name in options}, sorted(config.experts))
        for glob, options in config.overrides.items()
    }


def _check_overrides(config: MergeConfig, method: Method, merged: list[str]) -> None:
    for pattern, options in config.overrides.items() if config.config is None else ():
        method.resolve(options)
        if not any(overridden(name, pattern) for name in merged):
            raise UsageError(
                f"no merged tensor matches the override {pattern!r}",
                f"names look like {merged[len(merged) // 2]!r}" if merged else None,
            )


def _step(
    config: MergeConfig,
    method: Method,
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    alignments: Mapping[str, Alignment],
    spec: TensorSpec,
    device: torch.device,
) -> Merge | Copy:
    """Merge a tensor of which some expert has a version, copy any other."""
    source = Stored(base, spec.name)
    sharers = [task for task, alignment in alignments.items() if spec.name in alignment.shared]
    if not sharers or not base.tensors[spec.name].dtype.is_floating_point:
        return Copy(source, spec.numel, spec.dtype)
    view = View(
        name=spec.name,
        shape=spec.shape,
        tasks=tuple(sharers),
        base=source,
        experts=tuple(Stored(experts[task], alignments[task].shared[spec.name]) for task in sharers),
        seed=config.seed,
        device=device,
    )
    return Merge(view, options_for(method, spec.name, config.options, config.overrides), spec.dtype)


def _budget(config: MergeConfig, method: Method, steps: Sequence[Merge | Copy]) -> int:
    """Bytes under way at once: ``max_memory`` if it is enough, or what the method usually takes."""
    views, threads = [step.view for step in steps if isinstance(step, Merge)], thread_count(config.threads)
    if config.max_memory is None:
        return budget.usual(method, views, threads)
    least = budget.least(method, views, threads)
    if config.max_memory < least:
        raise UsageError(
            f"--max-memory {config.max_memory:,} is too little: merging {len(config.experts)} experts by "
            f"{method.name!r} holds {least:,} bytes at once",
            "give more, fewer --threads, or a method that works block by block",
        )
    return config.max_memory


def _announce(plan: MergePlan, progress: Progress) -> None:
    """Say what nobody asked for: defaults from the paper, a device that is not there."""
    for line in plan.origin.notes if plan.origin else ():
        progress.note(line)
    options = plan.method.resolve(plan.config.options)
    left = [f"{o.name}={options[o.name]}" for o in plan.method.options if o.name not in plan.config.options]
    if left:
        progress.note(f"{plan.method.name}: {', '.join(left)} (default, from {plan.method.link})")
    choose_device(plan.config.device, progress)  # says so where there is no CUDA


def _check_related(plan: MergePlan) -> dict[str, float]:
    """Per task the size of the task vector relative to the weights; refuse one that is as large as they are."""
    base_norm, norms = related.norms([step.view for step in plan.steps if isinstance(step, Merge)])
    strangers = related.unrelated(base_norm, norms)
    if strangers and not plan.config.allow_unrelated:
        task = strangers[0]
        raise RetexError(
            f"expert {task!r} ({plan.config.experts[task]}) was not tuned from the base {plan.config.base}: its task "
            f"vector is as large as the weights (norm {norms[task]:.4g} against {base_norm:.4g})",
            "give the base that the expert was tuned from; --allow-unrelated merges it all the same",
        )
    return {task: norm / base_norm if base_norm else 0.0 for task, norm in norms.items()}


def _prepare(plan: MergePlan, stack: ExitStack, progress: Progress) -> Prepared:
    """What the inputs say; nothing is opened or imported where nobody asks them."""
    if plan.inputs.idle:
        return Prepared(plan.steps, {})
    config = plan.config
    device = choose_device(config.device, Silent())
    models = ExpertModels(plan.experts, plan.alignments, device, config.model)
    threads = thread_count(config.threads)

    def room(steps: Sequence[Merge | Copy]) -> int:
        return _budget(config, plan.method, steps)

    return prepare(plan.inputs, plan.steps, models, stack, threads=threads, budget=room, progress=progress)


def _stream(plan: MergePlan, prepared: Prepared, writer: Writer, progress: Progress) -> None:
    stream(
        plan.method,
        prepared.steps,
        writer,
        threads=thread_count(plan.config.threads),
        budget=_budget(plan.config, plan.method, prepared.steps),  # statistics that were measured take room
        begin=progress.start,
        advance=progress.advance,
    )


def _files(plan: MergePlan) -> list[Path]:
    """The weight files of all inputs, each once."""
    return list(dict.fromkeys(path for c in (plan.base, *plan.experts.values()) for path in c.files))


def _recipe(plan: MergePlan, prepared: Prepared, hashes: Mapping[Path, str] | None) -> Recipe:
    """How the output is made; digests that are not known yet are placeholders of equal length."""
    known = hashes or {path: placeholder(index) for index, path in enumerate(_files(plan))}
    config = plan.config
    return Recipe(
        method=plan.method,
        options=plain(plan.method.resolve(config.options), list(plan.experts)),
        overrides=_plain_overrides(config, plan.method),
        origin=plan.origin,
        seed=config.seed,
        dtype=config.dtype,
        allowed={
            name: value
            for name, value in (
                ("allow_missing", list(config.allow_missing)),
                ("allow_unrelated", config.allow_unrelated),
            )
            if value
        },
        found=prepared.found,
        base=plan.base,
        experts=plan.experts,
        hashes=known,
    )


def _sign(plan: MergePlan, prepared: Prepared, writer: Writer, recipe: Recipe, hashes: Mapping[Path, str]) -> Recipe:
    """Put the digests into the headers and the model card beside the weights."""
    for path, digest in hashes.items():
        writer.patch(recipe.hashes[path], digest)
    signed = _recipe(plan, prepared, hashes)
    if plan.output.kind == "folder":
        writer.side_file("README.md", model_card(signed, Path(plan.config.output).name).encode())
    return signed


def _side_files(plan: MergePlan) -> dict[str, bytes | Path]:
    """The base's config and tokenizer, the config with the type of the weights that are written."""
    if plan.output.kind != "folder":
        return {}
    files: dict[str, bytes | Path] = dict(plan.base.side_files())
    if plan.config.dtype and plan.base.config is not None:
        files["config.json"] = config_with_dtype(plan.base.config, parse_dtype(plan.config.dtype))
    return files
