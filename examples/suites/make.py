"""Make a suite: download data and base, fine-tune the experts that the cache does not have, write a workspace.

    python examples/suites/make.py text4 .demo/text4

The workspace is what a user of their own experts would have: ``retex.toml``, ``experts/TASK`` (links into the cache),
``data/TASK-reference`` without labels, ``data/TASK-validation`` and ``data/TASK-test`` with them, and the module that
builds the network where transformers cannot.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from data import REFERENCES, X
from finetune import Family, expert

SUITES = {
    "text4": ("text", ("sms_spam", "movie", "newsgroups20", "election"), 128),
    "text8": ("text", None, 256),  # its siblings are hard to tell apart
    "vision6": ("vision", None, 128),
}
"""Family of tasks, which of them (None for all), and how many reference inputs of each the signatures take."""


def _progress(name: str) -> tuple[float, Callable[[int, int, str], None]]:
    started = time.monotonic()

    def show(step: int, steps: int, note: str) -> None:
        if sys.stderr.isatty():
            end = "\n" if step == steps else ""
            print(f"\r  {name}: step {step}/{steps}, {note}   ", end=end, file=sys.stderr, flush=True)
        elif step % 50 == 0:
            print(f"  {name}: step {step}/{steps}, {note}", file=sys.stderr, flush=True)

    return started, show


def _link(path: Path, target: Path) -> None:
    if path.is_symlink():
        path.unlink()
    path.symlink_to(target, target_is_directory=True)


def standard_error(share: float, rows: int) -> float:
    """Of an accuracy measured on so many rows."""
    return math.sqrt(share * (1 - share) / rows)


def make(
    family: Family[X],
    tasks: Sequence[str],
    workspace: Path,
    *,
    samples: int,
    budget: str,
    seed: int,
    steps: int | None,
) -> None:
    """Everything ``retex`` needs under ``workspace``. Exits with a message if an expert misses its floor by more than
    the chance of its test rows explains.

    ``steps`` replaces the tasks' own numbers of training steps; such experts have no floor to reach.
    """
    (workspace / "experts").mkdir(parents=True, exist_ok=True)
    (workspace / "data").mkdir(exist_ok=True)
    entries = []
    for name in tasks:
        task = family.tasks[name]
        split = task.load()
        started, show = _progress(name)
        folder, accuracy = expert(family, family.recipe(name, seed, steps or task.steps), split, show)
        took = time.monotonic() - started
        print(f"{name}: expert accuracy {100 * accuracy:.2f} %, floor {100 * task.floor:g} % ({took:.0f} s)")
        if accuracy < task.floor - standard_error(task.floor, len(split.test)) and steps is None:
            sys.exit(f"{name}: the expert in {folder} misses its floor; delete the folder and run again")
        _link(workspace / "experts" / name, folder)
        lines = [f"[tasks.{name}]", f'expert = "experts/{name}"']
        for key, part, rows in (
            ("inputs", "reference", split.train[:REFERENCES]),
            ("validation", "validation", split.validation),
            ("test", "test", split.test),
        ):
            file = f"data/{name}-{part}{family.suffix}"
            family.write(workspace / file, rows, None if key == "inputs" else split.labels)
            lines.append(f'{key} = "{file}"')
        entries.append("\n".join(lines) + "\n")
    _link(workspace / "base", family.base())
    for module in family.modules:
        shutil.copy(module, workspace)
    head = (
        f'[model]\n{family.model}\n[merge]\nmethod = "average"\n\n[offsets]\nbudget = "{budget}"\n\n'
        f"[signatures]\nsamples = {samples}\n{family.signatures}"
    )
    (workspace / "retex.toml").write_text("\n".join([head, *entries]))


def main() -> None:
    """Read the command line and make the suite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=sorted(SUITES))
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--samples", type=int, help="reference inputs per task for the signatures")
    parser.add_argument("--budget", help="default: the suite's own")
    parser.add_argument("--seed", type=int, default=0, help="seed of the fine-tuning")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these tasks")
    parser.add_argument("--steps", type=int, help="train for so many steps; floors do not apply")
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    module, tasks, samples = SUITES[arguments.suite]
    family = importlib.import_module(module).FAMILY
    if unknown := set(arguments.tasks or ()) - set(family.tasks):
        parser.error(f"no such task: {', '.join(sorted(unknown))}; there are {', '.join(family.tasks)}")
    make(
        family,
        arguments.tasks or tasks or tuple(family.tasks),
        arguments.workspace,
        samples=arguments.samples or samples,
        budget=arguments.budget or family.budget,
        seed=arguments.seed,
        steps=arguments.steps,
    )


if __name__ == "__main__":
    main()
