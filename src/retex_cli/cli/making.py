"""The commands that make the three artefacts: merge, fit-offsets, build-signatures."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated

import typer

from retex_cli.cli import options as shared
from retex_cli.cli.output import How, note
from retex_cli.cli.perform import perform
from retex_cli.cli.values import model_of, pairs, per_task, scalar, settings, size
from retex_cli.commands.fit_parts import PARTS
from retex_cli.errors import UsageError
from retex_cli.workspace import MERGED, OFFSETS, SIGNATURES, MergeSection, Workspace

Overrides = dict[str, dict[str, object]]


def merge(
    base: shared.Base = None,
    expert: shared.Experts = None,
    config: Annotated[
        str | None,
        typer.Option("--config", metavar="FILE", help="A mergekit YAML file: base, experts, method and options."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", metavar="NAME", help="How to merge; docs/methods.md lists all. [default: average]"),
    ] = None,
    scope: Annotated[
        str | None, typer.Option("--scope", metavar="tensor|global", help="Where ties takes its top-k.")
    ] = None,
    density: Annotated[
        list[str] | None,
        typer.Option(
            "--density", metavar="[TASK=]SHARE", help="Share of each task vector that is kept. Repeat for tasks."
        ),
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option("--weight", metavar="[TASK=]W", help="Factor on each task vector. Repeat for tasks."),
    ] = None,
    alpha: Annotated[
        str | None,
        typer.Option(
            "--alpha",
            metavar="SCALE",
            help="Scale of the merged task vector; auto: agrees best with the experts; validation: most accurate.",
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="[GLOB:]NAME=VALUE",
            help="Any option of the method, for the parameters that match. Repeat.",
        ),
    ] = None,
    inputs: shared.Inputs = None,
    validation: shared.Validation = None,
    samples: Annotated[
        int | None,
        typer.Option("--samples", min=8, metavar="N", help="Inputs of a task that are measured. [default: as usual]"),
    ] = None,
    batchnorm: Annotated[
        str | None,
        typer.Option(
            "--batchnorm", metavar="average|reestimate", help="Running statistics: the experts' mean, or from inputs."
        ),
    ] = None,
    model: shared.Model = None,
    batch_size: shared.BatchSize = None,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="OUT", help="NAME.safetensors, a folder or -. [default: merged/]"),
    ] = None,
    dtype: shared.DType = None,
    max_shard_size: shared.ShardSize = None,
    max_memory: Annotated[
        str | None, typer.Option("--max-memory", metavar="SIZE", help="A budget for the tensors held at once.")
    ] = None,
    allow_missing: shared.AllowMissing = None,
    allow_unrelated: Annotated[
        bool, typer.Option("--allow-unrelated", help="Merge experts that were not tuned from this base; recorded.")
    ] = False,
    device: shared.Device = "auto",
    threads: shared.Threads = None,
    seed: shared.Seed = 0,
    overwrite: shared.Overwrite = False,
    workspace: shared.Place = None,
    dry_run: shared.DryRun = False,
    quiet: shared.Quiet = False,
    as_json: shared.Json = False,
    debug: shared.Debug = False,
) -> None:
    """Merge experts into one checkpoint.

    The result has the base's shape and names and loads wherever the base does.

    \b
    retex merge --method ties
    retex merge --base org/base --expert cars=org/base-cars --expert dtd=dtd/ -o merged/
    retex merge --config mergekit.yml -o merged/
    """
    how = How(dry_run, quiet, as_json, streams=output == "-")
    space = Workspace.load(workspace)
    flags: dict[str, object] = {
        "scope": scope,
        "density": per_task(density, "--density"),
        "weight": per_task(weight, "--weight"),
        "alpha": None if alpha is None else scalar(alpha),
    }
    common, by_glob = settings(setting, "--set")
    given = pairs(expert, "--expert")
    if config is not None:
        _config_alone({"base": base, "expert": given or None, "method": method, "set": setting or None, **flags})
        space = _without_merge_section(space)
    chosen, options, overrides = method_options(space.merge, method, {**flags, **common}, by_glob)
    shard = size(str(max_shard_size or space.merge.max_shard_size or "5GB"), "--max-shard-size")
    memory = None if max_memory is None else size(max_memory, "--max-memory")
    start, experts = ("", {}) if config is not None else (space.need_base(base), space.with_experts(given))
    from retex_cli.commands import merge as command

    settled = command.MergeConfig(
        base=start,
        experts=experts,
        output=output or space.path(MERGED),
        method=chosen,
        options=options,
        overrides=overrides,
        dtype=dtype or space.merge.dtype,
        max_shard_size=shard,
        max_memory=memory,
        allow_missing=(*space.merge.allow_missing, *(allow_missing or ())),
        allow_unrelated=allow_unrelated,
        inputs=space.field("inputs", pairs(inputs, "--inputs")),
        validation=space.field("validation", pairs(validation, "--validation")),
        samples=samples or space.merge.samples,
        batchnorm=batchnorm or space.merge.batchnorm or "average",
        model=model_of(space, model),
        batch_size=batch_size or space.eval.batch_size or 32,
        device=device,
        threads=threads,
        seed=seed,
        overwrite=overwrite,
        config=config,
    )
    said = {method, *(name for name, value in flags.items() if value is not None), *common, *by_glob}
    with _blaming_the_file(space, said):
        perform(command.plan, command.run, settled, how)


def _config_alone(flags: Mapping[str, object]) -> None:
    """``--config`` says what is merged and how: a flag that says it too is refused."""
    for name, value in flags.items():
        if value is not None:
            raise UsageError(f"--{name} and --config cannot stand together", "change the file, or leave it out")


def _without_merge_section(space: Workspace) -> Workspace:
    if space.merge != MergeSection():
        note(f"{space.where}: [merge] is not used with --config")
    return replace(space, merge=MergeSection())


@contextmanager
def _blaming_the_file(space: Workspace, said_by_flags: Collection[str | None]) -> Iterator[None]:
    """A usage error about something that only ``[merge]`` says names the file."""
    section = space.merge
    said = {section.method, *section.options, *section.overrides}.union(*section.overrides.values())
    try:
        yield
    except UsageError as error:
        if any(repr(name) in error.message for name in said.difference(said_by_flags, [None])):
            raise UsageError(f"{space.where}: [merge]: {error.message}", error.hint) from error
        raise


def method_options(
    section: MergeSection, method: str | None, flags: Mapping[str, object], by_glob: Overrides
) -> tuple[str, dict[str, object], Overrides]:
    """Method, its options and overrides: the file's, with flags on top.

    Options in the file belong to the method in the file: another ``--method`` leaves them behind, and a note says so.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    chosen = method or section.method or "average"
    if method is not None and section.method is not None and method != section.method:
        left = sorted({*section.options, *(f"override {glob!r}" for glob in section.overrides)})
        if left:
            note(f"options of {section.method} in [merge] are not used with --method {method}: {', '.join(left)}")
        return chosen, given, by_glob
    overrides: Overrides = {glob: dict(values) for glob, values in section.overrides.items()}
    for glob, values in by_glob.items():
        overrides.setdefault(glob, {}).update(values)
    return chosen, {**section.options, **given}, overrides


def fit_offsets(
    expert: shared.Experts = None,
    merged: shared.Merged = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", metavar="SIZE", help="Per task: 0.25%, 80KB, 1MB or 0.1bpp. [default: 0.25%]"),
    ] = None,
    total_budget: Annotated[
        str | None,
        typer.Option("--total-budget", metavar="SIZE", help="Of all tasks together, shared out by what each needs."),
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(
            "--target", metavar="PERCENT", help="The smallest file that agrees with the experts on held-out inputs."
        ),
    ] = None,
    lossless: Annotated[
        bool,
        typer.Option(
            "--lossless", help="Store what is missing to the last bit, too; --budget is chosen if it is not given."
        ),
    ] = False,
    add: Annotated[
        list[str] | None,
        typer.Option("--add", metavar="NAME=REF", help="Add a task to the file; the others stay as they are. Repeat."),
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option("--remove", metavar="NAME", help="Take a task out of the file. Repeat.")
    ] = None,
    refine: Annotated[
        bool, typer.Option("--refine", help="Train the offsets on each task's unlabelled inputs, within the budget.")
    ] = False,
    without: Annotated[
        list[str] | None,
        typer.Option("--without", metavar="PART", help="Leave a part out: " + ", ".join(PARTS) + ". Repeat."),
    ] = None,
    base: Annotated[str | None, typer.Option("--base", metavar="REF", help="Needed for LoRA adapters.")] = None,
    inputs: shared.Inputs = None,
    model: shared.Model = None,
    batch_size: shared.BatchSize = None,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="FILE", help="The offsets. [default: offsets.safetensors]"),
    ] = None,
    device: shared.Device = "auto",
    threads: shared.Threads = None,
    seed: shared.Seed = 0,
    overwrite: shared.Overwrite = False,
    workspace: shared.Place = None,
    dry_run: shared.DryRun = False,
    quiet: shared.Quiet = False,
    as_json: shared.Json = False,
    debug: shared.Debug = False,
) -> None:
    """Fit what brings each expert back.

    The offsets from the merged checkpoint to every expert, within a budget of bytes per task. Needs no data, except for
    --target, which compares answers on the last quarter of each task's unlabelled inputs, and for --refine, which lets
    the recovered network learn the expert's features and answers on the first 256 of them and shares --total-budget
    out by them. Where a merge lies far to one side of its experts, unlike an average, the way back to their middle is
    the same for all: it is stored once, its bytes counted in equal shares, or left out where they would not go far.
    What a task has beyond the base (its head, labels, tokenizer) travels in the same file. Where the network can be
    run, offsets that answer clearly worse than fewer or none are not kept, and a note says so: this compares answers to
    inputs that are made without data, or to the task's own with --refine. With --lossless recovery gives the expert
    back bit for bit, checked by SHA-256.

    \b
    retex fit-offsets --budget 0.25%
    retex fit-offsets --target 99.5
    retex fit-offsets --budget 0.1% --refine
    retex fit-offsets --merged merged/ --expert cars=org/base-cars --expert dtd=dtd/
    retex fit-offsets --add pets=org/base-pets
    """
    how = How(dry_run, quiet, as_json)
    space = Workspace.load(workspace)
    named, joining, leaving = pairs(expert, "--expert"), pairs(add, "--add"), tuple(dict.fromkeys(remove or ()))
    changes = bool(joining or leaving)
    said = any(value is not None for value in (budget, total_budget, target))
    chosen = budget if said else space.offsets.budget
    if lossless and budget is None and chosen:
        note(f"{space.where}: budget = {space.offsets.budget!r} is used; without it --lossless chooses one")
    from retex_cli.commands import change_offsets, fit_offsets

    config = fit_offsets.FitOffsetsConfig(
        merged=merged or space.path(MERGED),
        experts=named if changes else space.with_experts(named),
        output=output or space.path(OFFSETS),
        budget=chosen,
        total_budget=total_budget,
        target=None if target is None else target / 100,
        inputs=space.field("inputs", pairs(inputs, "--inputs")),
        model=model_of(space, model),
        batch_size=batch_size or space.eval.batch_size or 32,
        lossless=lossless,
        refine=refine,
        without=frozenset(without or ()),
        seed=seed,
        base=base or space.base,
        device=device,
        threads=threads,
        overwrite=overwrite,
        add=joining,
        remove=leaving,
    )
    if changes:
        perform(change_offsets.plan, change_offsets.run, config, how)
    else:
        perform(fit_offsets.plan, fit_offsets.run, config, how)


def build_signatures(
    inputs: shared.Inputs = None,
    merged: shared.Merged = None,
    base: shared.Base = None,
    model: shared.Model = None,
    preset: Annotated[
        str | None,
        typer.Option("--preset", metavar="default|sim", help="sim: the published identifier; it needs --base."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", min=32, max=256, metavar="N", help="Inputs per task, 32 to 256.")
    ] = None,
    or_fewer: Annotated[
        bool,
        typer.Option("--or-fewer", help="A task with fewer inputs gives all it has, as with samples of retex.toml."),
    ] = False,
    max_length: Annotated[int | None, typer.Option("--max-length", min=1, metavar="N", help="Tokens per text.")] = None,
    add: Annotated[
        list[str] | None,
        typer.Option("--add", metavar="NAME[=PATH]", help="A task joins the file, from its own inputs alone. Repeat."),
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option("--remove", metavar="NAME", help="A task leaves the file. Repeat.")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="FILE", help="The signatures. [default: signatures.safetensors]"),
    ] = None,
    batch_size: shared.BatchSize = None,
    device: shared.Device = "auto",
    threads: shared.Threads = None,
    seed: shared.Seed = 0,
    overwrite: shared.Overwrite = False,
    workspace: shared.Place = None,
    dry_run: shared.DryRun = False,
    quiet: shared.Quiet = False,
    as_json: shared.Json = False,
    debug: shared.Debug = False,
) -> None:
    """Learn to tell tasks apart.

    Describes every task by a few of its unlabelled inputs, so that the task of a new input can be identified.

    \b
    retex build-signatures
    retex build-signatures --merged merged/ --inputs cars=cars.jsonl --inputs dtd=dtd.csv
    retex build-signatures --add birds=birds.jsonl --remove dtd
    """
    how = How(dry_run, quiet, as_json)
    space = Workspace.load(workspace)
    if add or remove:
        from retex_cli.commands import change_signatures

        fixed = {"--inputs": inputs, "--base": base, "--preset": preset, "--max-length": max_length}
        if given := [name for name, value in fixed.items() if value]:
            raise UsageError(
                f"{given[0]} does not go with --add and --remove, which leave the file's own choices as they are",
                "build the signatures again to change them",
            )
        change = change_signatures.ChangeSignaturesConfig(
            merged=merged or space.path(MERGED),
            signatures=output or space.path(SIGNATURES),
            add=_joining(space, add),
            remove=tuple(remove or ()),
            model=model_of(space, model),
            samples=samples or space.signatures.samples,
            or_fewer=or_fewer or samples is None,
            batch_size=batch_size or space.eval.batch_size or 32,
            device=device,
            threads=threads,
        )
        perform(change_signatures.plan, change_signatures.run, change, how)
        return
    paths = space.with_inputs(pairs(inputs, "--inputs"))
    from retex_cli.commands import build_signatures as command

    config = command.BuildSignaturesConfig(
        merged=merged or space.path(MERGED),
        inputs=paths,
        output=output or space.path(SIGNATURES),
        preset=preset or space.signatures.preset or "default",
        base=base or space.base,
        model=model_of(space, model),
        samples=samples or space.signatures.samples,
        or_fewer=or_fewer or samples is None,
        max_length=max_length or space.signatures.max_length,
        batch_size=batch_size or space.eval.batch_size or 32,
        device=device,
        threads=threads,
        seed=seed,
        overwrite=overwrite,
    )
    perform(command.plan, command.run, config, how)


def _joining(space: Workspace, items: list[str] | None) -> dict[str, str]:
    """``NAME=PATH``, or ``NAME`` alone for the inputs that the workspace has of it."""
    known = space.field("inputs", {})
    found = {}
    for item in items or ():
        if "=" in item:
            found.update(pairs([item], "--add"))
        elif item in known:
            found[item] = known[item]
        else:
            raise UsageError(f"--add {item}: no inputs are named for it", f"--add {item}=FILE")
    return found
