"""``retex merge``: several experts of one base become one checkpoint of the base's shape.

``plan`` opens every input by its header, matches tensors and refuses what cannot be meant; ``run`` streams tensors
through the method into the output. Memory follows the block at hand, not the model.
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from retex_cli.commands.merge_plan import Recipe, Stored, account_for, check_accounts, config_with_dtype, placeholder
from retex_cli.commands.merge_report import MergeReport, model_card
from retex_cli.errors import RetexError, UsageError
from retex_cli.io.align import Alignment, align
from retex_cli.io.checkpoint import Checkpoint, open_checkpoint, open_expert
from retex_cli.io.dtypes import parse_dtype
from retex_cli.io.provenance import sha256_file
from retex_cli.io.writer import Output, TensorSpec, Writer, open_output
from retex_cli.merging import budget, related
from retex_cli.merging.engine import Copy, Merge, stream
from retex_cli.merging.table import Method, find_method, options_for
from retex_cli.merging.view import View
from retex_cli.parallel import one_thread_each
from retex_cli.progress import Progress, Silent


@dataclass(frozen=True)
class MergeConfig:
    """What to merge, how, and where to.

    ``experts`` maps task names to references (file, folder, Hub id or LoRA adapter). ``options`` are the method's,
    ``overrides`` maps globs over the base's tensor names to options that differ there. ``max_memory`` bounds the bytes
    of the tensors held at once. ``allow_missing`` are globs of base parameters that an expert may lack,
    ``allow_unrelated`` lets experts through that were not tuned from this base.
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
    device: str = "auto"
    threads: int | None = None
    seed: int = 0
    overwrite: bool = False


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

    def report(self) -> MergeReport:
        """What would happen, from the headers."""
        return MergeReport(
            output=str(self.output),
            method=self.method,
            options=self.method.resolve(self.config.options),
            overrides=self.config.overrides,
            seed=self.config.seed,
            accounts=account_for(self.base, self.experts, self.alignments, self.steps, self.specs),
            bytes_in=sum(checkpoint.nbytes for checkpoint in (self.base, *self.experts.values())),
            bytes_out=sum(spec.nbytes for spec in self.specs),
            peak_memory=self.budget,
        )


def plan(config: MergeConfig) -> MergePlan:
    """Open, match, check. ``UsageError`` for what cannot be meant, ``RetexError`` for inputs that do not fit."""
    method = find_method(config.method)
    method.resolve(config.options)
    _check_tasks(config, method)
    _device(config.device)
    output = Output.parse(config.output)
    dtype = parse_dtype(config.dtype) if config.dtype else None
    base = open_checkpoint(config.base)
    experts = {task: open_expert(config.experts[task], base) for task in sorted(config.experts)}
    alignments = {task: align(base, e, allow_missing=config.allow_missing) for task, e in experts.items()}
    check_accounts(base, experts, alignments)
    specs = tuple(
        TensorSpec(name, dtype if dtype and info.dtype.is_floating_point else info.dtype, info.shape)
        for name, info in base.tensors.items()
    )
    steps = tuple(_step(config, method, base, experts, alignments, spec) for spec in specs)
    _check_overrides(config, method, [step.view.name for step in steps if isinstance(step, Merge)])
    inputs = [path for checkpoint in (base, *experts.values()) for path in checkpoint.files]
    output.check(config.overwrite, inputs, sum(spec.nbytes for spec in specs))
    return MergePlan(config, method, base, experts, alignments, steps, specs, output, _budget(config, method, steps))


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
        hashing = _Hashing(plan)
        stack.callback(hashing.close)
        recipe = _recipe(plan, hashing.all() if plan.output.kind == "stdout" else None)
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
        _stream(plan, writer, progress)
        if plan.output.kind != "stdout":
            recipe = _sign(plan, writer, recipe, hashing.all())
    return plan.report().finished(time.monotonic() - began, ratios, recipe.hashes)


def _check_tasks(config: MergeConfig, method: Method) -> None:
    if not config.experts:
        raise UsageError("there is no expert to merge", "give some: --expert NAME=REF, or [tasks.NAME] in retex.toml")
    if method.needs == "inputs":
        raise UsageError(
            f"method {method.name!r} needs statistics of every task's inputs, which this version does not collect",
            "choose a method that needs none: average, ties, tsv_m",
        )
    if method.needs == "two experts" and len(config.experts) != 2:
        names = ", ".join(sorted(config.experts))
        raise UsageError(
            f"method {method.name!r} merges two experts, {len(config.experts)} are given: {names}",
            "choose two, or a method that takes any number: average, ties",
        )


def _check_overrides(config: MergeConfig, method: Method, merged: list[str]) -> None:
    for pattern, options in config.overrides.items():
        method.resolve(options)
        if not any(fnmatch.fnmatchcase(name, pattern) for name in merged):
            raise UsageError(
                f"no merged tensor matches the override {pattern!r}",
                f"names look like {merged[len(merged) // 2]!r}" if merged else None,
            )


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"unknown device {name!r}", "it can be auto, cpu or cuda")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _step(
    config: MergeConfig,
    method: Method,
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    alignments: Mapping[str, Alignment],
    spec: TensorSpec,
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
        device=_device(config.device),
    )
    return Merge(view, options_for(method, spec.name, config.options, config.overrides), spec.dtype)


def _budget(config: MergeConfig, method: Method, steps: tuple[Merge | Copy, ...]) -> int:
    """Bytes under way at once: ``max_memory`` if it is enough, or what the method usually takes."""
    views = [step.view for step in steps if isinstance(step, Merge)]
    if config.max_memory is None:
        return budget.usual(method, views, config.threads)
    least = budget.least(method, views, config.threads)
    if config.max_memory < least:
        raise UsageError(
            f"--max-memory {config.max_memory:,} is too little: merging {len(config.experts)} experts by "
            f"{method.name!r} holds {least:,} bytes at once",
            "give more, fewer --threads, or a method that works block by block",
        )
    return config.max_memory


def _announce(plan: MergePlan, progress: Progress) -> None:
    """Say what nobody asked for: defaults from the paper, a device that is not there."""
    options = plan.method.resolve(plan.config.options)
    left = [f"{o.name}={options[o.name]}" for o in plan.method.options if o.name not in plan.config.options]
    if left:
        progress.note(f"{plan.method.name}: {', '.join(left)} (default, from {plan.method.link})")
    if plan.config.device != "cpu" and _device(plan.config.device).type == "cpu":
        progress.note(f"--device {plan.config.device}: no CUDA device here, using the CPU")


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


def _stream(plan: MergePlan, writer: Writer, progress: Progress) -> None:
    progress.start("merging", len(plan.steps))
    stream(
        plan.method,
        plan.steps,
        writer,
        threads=plan.config.threads,
        budget=plan.budget,
        advance=progress.advance,
    )


class _Hashing:
    """SHA-256 of every input file: beside the merge on whatever is idle, or after it if threads are counted."""

    def __init__(self, plan: MergePlan) -> None:
        self._files = dict.fromkeys(path for c in (plan.base, *plan.experts.values()) for path in c.files)
        threads = plan.config.threads or budget.default_threads()
        self._pool = ThreadPoolExecutor(min(len(self._files), threads), "sha256")
        self._pending = {} if plan.config.threads else self._begin()

    def _begin(self) -> dict[Path, Future[str]]:
        return {path: self._pool.submit(sha256_file, path) for path in self._files}

    def all(self) -> dict[Path, str]:
        """File -> hexadecimal digest, once all are known."""
        self._pending = self._pending or self._begin()
        return {path: future.result() for path, future in self._pending.items()}

    def close(self) -> None:
        """Forget what has not begun."""
        self._pool.shutdown(cancel_futures=True)


def _recipe(plan: MergePlan, hashes: Mapping[Path, str] | None) -> Recipe:
    """How the output is made; digests that are not known yet are placeholders of equal length."""
    files = dict.fromkeys(path for c in (plan.base, *plan.experts.values()) for path in c.files)
    known = hashes or {path: placeholder(index) for index, path in enumerate(files)}
    config = plan.config
    return Recipe(
        method=plan.method,
        options=plan.method.resolve(config.options),
        overrides={
            glob: {name: plan.method.resolve(options)[name] for name in options}
            for glob, options in config.overrides.items()
        },
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
        base=plan.base,
        experts=plan.experts,
        hashes=known,
    )


def _sign(plan: MergePlan, writer: Writer, recipe: Recipe, hashes: Mapping[Path, str]) -> Recipe:
    """Put the digests into the headers and the model card beside the weights."""
    for path, digest in hashes.items():
        writer.patch(recipe.hashes[path], digest)
    signed = _recipe(plan, hashes)
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
