"""Make a suite: download data and base, fine-tune the experts that the cache does not have, write a workspace.

    python examples/suites/make.py text4 .demo/text4

The workspace is what a user of their own experts would have: ``retex.toml``, ``experts/TASK`` (links into the cache),
``data/TASK-reference.jsonl`` without labels and ``data/TASK-test.jsonl`` with them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from finetune import Recipe, expert
from tasks import SUITES, TASKS, Row, base_model, load

REFERENCES = 256
"""Unlabelled training inputs written for each task; ``retex build-signatures`` reads the first ``samples`` of them."""


def _progress(name: str) -> tuple[float, Callable[[int, int, str], None]]:
    started = time.monotonic()

    def show(step: int, steps: int, note: str) -> None:
        if sys.stderr.isatty():
            end = "\n" if step == steps else ""
            print(f"\r  {name}: step {step}/{steps}, {note}   ", end=end, file=sys.stderr, flush=True)
        elif step % 50 == 0:
            print(f"  {name}: step {step}/{steps}, {note}", file=sys.stderr, flush=True)

    return started, show


def _write_rows(path: Path, rows: list[Row], *, labelled: bool) -> None:
    keys = ("text", "label") if labelled else ("text",)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(dict(zip(keys, row, strict=False)), ensure_ascii=False) + "\n")


def _link(path: Path, target: Path) -> None:
    if path.is_symlink():
        path.unlink()
    path.symlink_to(target, target_is_directory=True)


def make(tasks: Sequence[str], workspace: Path, *, samples: int, budget: str, seed: int, steps: int | None) -> None:
    """Everything ``retex`` needs under ``workspace``. Exits with a message if an expert misses its floor.

    ``steps`` replaces the tasks' own numbers of training steps; such experts have no floor to reach.
    """
    (workspace / "experts").mkdir(parents=True, exist_ok=True)
    (workspace / "data").mkdir(exist_ok=True)
    entries = []
    for name in tasks:
        task = TASKS[name]
        split = load(task)
        started, show = _progress(name)
        folder, accuracy = expert(task, Recipe(name, seed=seed, steps=steps or task.steps), split, show)
        took = time.monotonic() - started
        print(f"{name}: expert accuracy {100 * accuracy:.2f} %, floor {100 * task.floor:g} % ({took:.0f} s)")
        if accuracy < task.floor and steps is None:
            sys.exit(f"{name}: the expert in {folder} misses its floor; delete the folder and run again")
        _link(workspace / "experts" / name, folder)
        _write_rows(workspace / "data" / f"{name}-reference.jsonl", split.train[:REFERENCES], labelled=False)
        _write_rows(workspace / "data" / f"{name}-test.jsonl", split.test, labelled=True)
        entries.append(
            f"[tasks.{name}]\n"
            f'expert = "experts/{name}"\n'
            f'inputs = "data/{name}-reference.jsonl"\n'
            f'test = "data/{name}-test.jsonl"\n'
        )
    _link(workspace / "base", base_model())
    head = (
        '[model]\nbase = "base"  # all-MiniLM-L6-v2\n\n'
        '[merge]\nmethod = "average"\n\n'
        f'[offsets]\nbudget = "{budget}"\n\n'
        f"[signatures]\nsamples = {samples}\nmax_length = {Recipe.max_length}  # tokens, as in fine-tuning\n"
    )
    (workspace / "retex.toml").write_text("\n".join([head, *entries]))


def main() -> None:
    """Read the command line and make the suite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=sorted(SUITES))
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--samples", type=int, default=128, help="reference inputs per task for the signatures")
    parser.add_argument("--budget", default="0.25%")
    parser.add_argument("--seed", type=int, default=0, help="seed of the fine-tuning")
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), help="only these tasks")
    parser.add_argument("--steps", type=int, help="train for so many steps; floors do not apply")
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    make(
        arguments.tasks or SUITES[arguments.suite],
        arguments.workspace,
        samples=arguments.samples,
        budget=arguments.budget,
        seed=arguments.seed,
        steps=arguments.steps,
    )


if __name__ == "__main__":
    main()
