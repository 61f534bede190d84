"""The commands about files: inspect says what one holds, init starts a workspace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retex_cli.cli import options as shared
from retex_cli.cli.output import How
from retex_cli.cli.perform import perform
from retex_cli.cli.values import pairs
from retex_cli.workspace import MERGED, Workspace


def inspect(
    path: Annotated[
        str | None,
        typer.Argument(metavar="PATH", help="A safetensors file, a folder or a hub id. [default: merged/]"),
    ] = None,
    workspace: shared.Place = None,
    quiet: shared.Quiet = False,
    as_json: shared.Json = False,
    debug: shared.Debug = False,
) -> None:
    """Show what a file holds and how it was made.

    Takes checkpoints of any origin and retex's own artefacts; reads headers only.

    \b
    retex inspect offsets.safetensors
    """
    how = How(quiet=quiet, as_json=as_json, answer=True)
    from retex_cli.commands import inspect as command

    config = command.InspectConfig(path=path or Workspace.load(workspace).path(MERGED))
    perform(command.plan, command.run, config, how)


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write retex.toml.")] = Path(),
    base: shared.Base = None,
    expert: shared.Experts = None,
    overwrite: shared.Overwrite = False,
    dry_run: shared.DryRun = False,
    quiet: shared.Quiet = False,
    as_json: shared.Json = False,
    debug: shared.Debug = False,
) -> None:
    """Write a commented retex.toml to fill in.

    \b
    retex init --base org/base --expert cars=org/base-cars --expert dtd=dtd/
    """
    how = How(dry_run, quiet, as_json)
    experts = pairs(expert, "--expert")
    from retex_cli.commands import init as command

    config = command.InitConfig(folder=str(folder), base=base, experts=experts, overwrite=overwrite)
    perform(command.plan, command.run, config, how)
