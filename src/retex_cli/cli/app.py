"""The typer application and the entry point ``retex``."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.main import get_command

from retex_cli import __version__
from retex_cli.cli import files, making, using
from retex_cli.cli.errors import INTERRUPTED, explain

# Plain help: the same text on every terminal, and rich is not imported for it.
app = typer.Typer(
    name="retex",
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("init")(files.init)
app.command("merge")(making.merge)
app.command("fit-offsets")(making.fit_offsets)
app.command("build-signatures")(making.build_signatures)
app.command("recover")(using.recover)
app.command("eval")(using.evaluate)
app.command("identify")(using.identify)
app.command("inspect")(files.inspect)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"retex {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Say which one.")
    ] = False,
) -> None:
    """Merge fine-tuned experts into one checkpoint and bring every one of them back from it.

    In a folder with a retex.toml every command runs without further flags; flags override the file, and with flags
    alone no file is needed. Results go to standard output, all else to standard error.

    Exit status: 0 done, 1 failed, 2 wrong usage, 3 a gate was missed, 130 interrupted.
    """


def run(arguments: Sequence[str]) -> int:
    """One call of ``retex`` with these arguments; returns the exit status."""
    before = arguments[: arguments.index("--")] if "--" in arguments else arguments
    as_json, debug = "--json" in before, "--debug" in before
    _calm_libraries()
    try:
        status = get_command(app).main(args=list(arguments) or ["--help"], prog_name="retex", standalone_mode=False)
        if status == INTERRUPTED:  # the parser turns Ctrl-C into a status
            raise KeyboardInterrupt
        sys.stdout.flush()
        return int(status or 0)
    except SystemExit as stop:  # the reader of our standard output has gone
        return stop.code if isinstance(stop.code, int) else 1
    except BaseException as error:
        return explain(error, as_json=as_json, debug=debug)


def _calm_libraries() -> None:
    """Keep foreign chatter out of the output (our own progress counts downloads), and numpy's threads, which nothing
    here needs, from spinning while modules are imported. A variable already set stays."""
    for name, value in (
        ("OPENBLAS_NUM_THREADS", "1"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
    ):
        os.environ.setdefault(name, value)


def main() -> None:
    """The console script. Looking for garbage among modules, while they are imported and once more at the end, is a
    third of what starting takes: see ``collect_garbage``."""
    gc.disable()
    atexit.register(gc.freeze)
    sys.exit(run(sys.argv[1:]))
