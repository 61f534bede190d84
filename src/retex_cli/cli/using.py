"""The commands that use the three artefacts: recover, eval, identify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retex_cli.cli import options as shared
from retex_cli.cli.output import How, note
from retex_cli.cli.perform import perform, perform_all, perform_lines
from retex_cli.cli.values import model_of, names, pairs, shares, size
from retex_cli.errors import UsageError
from retex_cli.workspace import MERGED, OFFSETS, PROTOCOLS, RECOVERED, SIGNATURES, Workspace


def recover(
    task: Annotated[
        str | None, typer.Option("--task", metavar="NAME", help="Bring this expert back; auto identifies it.")
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="INPUT", help="Identify the task of this input first. Repeat for a batch."),
    ] = None,
    mix: Annotated[
        str | None, typer.Option("--mix", metavar="NAME=SHARE,...", help="Interpolate experts; shares sum to 1.")
    ] = None,
    soft: Annotated[bool, typer.Option("--soft", help="With auto: mix experts by how well they fit.")] = False,
    min_confidence: Annotated[
        float | None,
        typer.Option("--min-confidence", metavar="P", help="With auto: exit 3 if it is less sure (0.95) or unknown."),
    ] = None,
    head: Annotated[
        str | None, typer.Option("--head", metavar="NAME", help="Whose head a mix gets. [default: the largest share's]")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "-o", "--output", metavar="OUT", help="NAME.safetensors, a folder or -. [default: recovered/NAME/]"
        ),
    ] = None,
    merged: shared.Merged = None,
    offsets: shared.Offsets = None,
    signatures: shared.Signatures = None,
    model: shared.Model = None,
    dtype: shared.DType = None,
    max_shard_size: shared.ShardSize = None,
    device: shared.Device = "auto",
    threads: shared.Threads = None,
    overwrite: shared.Overwrite = False,
    workspace: shared.Place = None,
    dry_run: shared.DryRun = False,
    quiet: shared.Quiet = False,
    as_json: shared.Json = False,
    debug: shared.Debug = False,
) -> None:
    """Bring an expert back.

    Needs the merged checkpoint and the offsets, and the signatures where the task is to be identified: then it says
    what it decided and how sure it was, and mixes experts where the inputs are like none of the tasks. In a workspace,
    with nothing else said, brings back every task's expert.

    \b
    retex recover --task cars -o cars.safetensors
    retex recover --input photo.jpg -o expert/ --min-confidence 0.95
    retex recover --mix cars=0.7,dtd=0.3 -o mixed/
    """
    how = How(dry_run, quiet, as_json, streams=output == "-")
    space = Workspace.load(workspace)
    chosen = [task] if task or inputs or mix else _every_task(space, output)
    parts = shares(mix, "--mix")
    shard = size(max_shard_size or "5GB", "--max-shard-size")
    function = model_of(space, model)
    from retex_cli.commands import recover as command

    configs = [
        command.RecoverConfig(
            merged=merged or space.path(MERGED),
            offsets=offsets or space.path(OFFSETS),
            signatures=signatures or _if_there(space.path(SIGNATURES)),
            output=output or space.path(f"{RECOVERED}/{name or ('mix' if mix else 'auto')}"),
            task=name,
            input=tuple(inputs or ()),
            mix=parts,
            soft=soft,
            min_confidence=min_confidence,
            head=head,
            model=function,
            dtype=dtype,
            max_shard_size=shard,
            device=device,
            threads=threads,
            overwrite=overwrite,
        )
        for name in chosen
    ]
    perform_all(command.plan, command.run, configs, how)


def _every_task(space: Workspace, output: str | None) -> list[str | None]:
    """All tasks of the workspace, for ``retex recover`` with nothing else."""
    if not space.tasks:
        raise UsageError("which expert? nothing was asked for", "--task NAME, --input INPUT or --mix NAME=SHARE,...")
    if output is not None and len(space.tasks) > 1:
        raise UsageError(
            f"-o {output} is one place and {space.where} has {len(space.tasks)} tasks", "say which one: --task NAME"
        )
    return list(space.tasks)


def _if_there(path: str) -> str | None:
    """Signatures are needed only to identify: a default file that is not there is not an error yet."""
    return path if Path(path).exists() else None


def evaluate(
    test: shared.Tests = None,
    expert: shared.Experts = None,
    merged: shared.Merged = None,
    offsets: shared.Offsets = None,
    signatures: shared.Signatures = None,
    protocols: Annotated[
        str | None,
        typer.Option(
            "--protocols",
            "--protocol",
            metavar="K,E,H",
            help="Task known; encoder identified; encoder and head identified.",
        ),
    ] = None,
    blend: Annotated[
        bool, typer.Option("--blend/--no-blend", help="Several experts answer an input whose task is unsure.")
    ] = True,
    fail_under: Annotated[
        str | None,
        typer.Option(
            "--fail-under", metavar="GATE", help="Exit 3 below it: 99 (mean under K), or worst=97,H=95; percent."
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="FILE", help="Keep the JSON object in this file, too.")
    ] = None,
    picture: Annotated[
        str | None, typer.Option("--picture", metavar="FILE", help="Draw which tasks are taken for which: an SVG file.")
    ] = None,
    logits: Annotated[
        str | None, typer.Option("--logits", metavar="FILE", help="Keep every model's logits in this safetensors file.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", metavar="REF", help="Needed for LoRA adapters.")] = None,
    model: shared.Model = None,
    batch_size: shared.BatchSize = None,
    device: shared.Device = "auto",
    threads: shared.Threads = None,
    workspace: shared.Place = None,
    dry_run: shared.DryRun = False,
    quiet: shared.Quiet = False,
    as_json: shared.Json = False,
    debug: shared.Debug = False,
) -> None:
    """Score what came back.

    Experts, merged and recovered models side by side on every task's labelled test data. How many answers are right and
    how many tasks are found stand apart, each with its 95 % interval.

    \b
    retex eval --fail-under 99
    retex eval --json > eval.json
    retex eval --protocol K,E,H --picture confusion.svg
    """
    how = How(dry_run, quiet, as_json, answer=True)
    space = Workspace.load(workspace)
    tests = space.with_tests(pairs(test, "--test"))
    experts = space.with_experts(pairs(expert, "--expert"))
    signatures = signatures or _if_there(space.path(SIGNATURES))
    from retex_cli.commands import eval as command

    config = command.EvalConfig(
        merged=merged or space.path(MERGED),
        offsets=offsets or space.path(OFFSETS),
        signatures=signatures,
        experts=experts,
        tests=tests,
        base=base or space.base,
        model=model_of(space, model),
        output=output,
        picture=picture,
        logits=logits,
        protocols=names(protocols) or space.eval.protocols or _possible(signatures),
        blend=blend,
        fail_under=fail_under,
        batch_size=batch_size or space.eval.batch_size or 64,
        device=device,
        threads=threads,
    )
    perform(command.plan, command.run, config, how)


def _possible(signatures: str | None) -> tuple[str, ...]:
    """All protocols, or the one that identifies nothing."""
    if signatures is None:
        note(f"no {SIGNATURES} here: protocol K only")
        return PROTOCOLS[:1]
    return PROTOCOLS


def identify(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT", help="A text, an image, a folder of images, a file of inputs, or - for lines."),
    ],
    batch: Annotated[
        bool, typer.Option("--batch", help="The inputs share a task: one answer for all of them.")
    ] = False,
    merged: shared.Merged = None,
    signatures: shared.Signatures = None,
    model: shared.Model = None,
    batch_size: shared.BatchSize = None,
    device: shared.Device = "auto",
    threads: shared.Threads = None,
    workspace: shared.Place = None,
    dry_run: shared.DryRun = False,
    quiet: shared.Quiet = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON Lines: an object for every input, failures included.")
    ] = False,
    debug: shared.Debug = False,
) -> None:
    """Tell which task an input belongs to.

    A line for every input, in order: the task, or "unknown" where it is like none of them; the probability, calibrated
    on left-out reference inputs; the margin to the second best; the input. Lines of standard input are texts, or JSON
    objects where they begin with {. Inputs that cannot be used are named on standard error, the others go on, and the
    exit status is 1.

    \b
    retex identify photo.jpg "a text of some words"
    retex identify questions.jsonl --json
    retex identify --batch unknown-photos/
    cut -f 3 table.tsv | retex identify - | cut -f 1 | sort | uniq -c
    """
    how = How(dry_run, quiet, as_json, answer=True)
    space = Workspace.load(workspace)
    from retex_cli.commands import identify as command

    config = command.IdentifyConfig(
        merged=merged or space.path(MERGED),
        signatures=signatures or space.path(SIGNATURES),
        inputs=tuple(inputs),
        batch=batch,
        model=model_of(space, model),
        batch_size=batch_size or space.eval.batch_size or 64,
        device=device,
        threads=threads,
    )
    perform_lines(command.plan, command.stream, config, how)
