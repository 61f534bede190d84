"""Accuracy against bytes, retex and its rivals on the same experts: each row is fitted, written and evaluated.

    python benchmarks/pareto.py text8|vision6 [--rows 1000] [--forms svd,retex] [--sizes 0.5%,1%] [--merge ties]
                                [--alpha auto] [--seed 1] [--fresh]

Protocol K: task and head are known. A row that was measured before with the same sources, experts and test rows comes
from the cache, so an interrupted run goes on where it stopped. Rivals start from the plain average of seed 0 alone.
Rows go into ``results/pareto.json`` under the name of the suite, in place of those of the same form and size,
accuracies as shares of the experts' own, and into a picture, ``docs/pareto-SUITE.svg``; other merges and seeds have
retex's rows alone, and no picture.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast

import measure
import torch
from field import Field
from pareto_tables import NAME, plot
from record import ROOT, provenance, write
from rivals.form import Case, Form
from rivals.table import forms
from tables import load

from retex_cli.io.checkpoint import open_checkpoint

BUDGETS = ("0.05%", "0.1%", "0.25%", "0.5%", "1%", "2%")
REFINED = {"text8": ("0.05%", "0.1%", "0.5%"), "vision6": ("0.5%", "1%", "2%")}
"""What ``--refine``, which takes minutes a task, is measured at, and all that other merges and seeds are."""
OURS: dict[str, list[str]] = {"retex": [], "retex-refine": ["--refine"]}
"""Rows of retex's own: name -> what is typed after ``fit-offsets --total-budget SIZE``. A size in percent is one of a
task on average, shared out over tasks by need."""
DECIDING = ("offsets",)
REFINING = (*DECIDING, "models/distil.py", "models/student.py", "commands/refine.py")
"""The sources that decide what retex's rows hold, and those of the refined ones."""

Entry = dict[str, object]


@dataclass(frozen=True)
class Row:
    """One row: what it is called, which sources decide it, and what measures it."""

    form: str
    size: str
    sources: str
    measured: Callable[[], Entry]


def retex(folder: Path, *arguments: str) -> dict[str, object]:
    """One command on the workspace ``folder``, in a process of its own; its JSON."""
    command, *rest = arguments
    line = [*measure.RETEX, command, "-w", str(folder), *rest, "--quiet", "--json"]
    done = subprocess.run(line, check=True, stdout=subprocess.PIPE, env=measure.environment())
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def ours(field: Field, folder: Path, merged: Path, budget: str, options: Sequence[str]) -> Entry:
    """retex itself: the command lines that a user types, and the experts that they write."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        offsets, expert = Path(name) / "offsets.safetensors", Path(name) / "expert.safetensors"
        line = ["fit-offsets", "--merged", str(merged), "-o", str(offsets), "--total-budget", budget, *options]
        started = time.monotonic()
        report = retex(folder, *line)
        took = time.monotonic() - started

        def recovered(task: str) -> dict[str, torch.Tensor]:
            files = ("--merged", str(merged), "--offsets", str(offsets), "-o", str(expert))
            retex(folder, "recover", *files, "--task", task, "--overwrite")
            with open_checkpoint(expert) as checkpoint:
                return field.tensors(checkpoint, task)

        tasks = report["tasks"]
        assert isinstance(tasks, dict)
        bytes_ = sum(task["offset_bytes"] for task in tasks.values()) / len(tasks)
        return _entry(field, bytes_, took, field.scores(recovered))


def rival(field: Field, case: Case, form: Form) -> Entry:
    """A rival: its files, and the experts that they decode to."""
    started = time.monotonic()
    files = form.encode(case)
    took = time.monotonic() - started
    scores = field.scores(lambda task: form.decode(case.known, files, task))
    more = {"note": form.note, "shared_bytes": len(files.shared)}
    return {**_entry(field, form.bytes_per_task(files), took, scores), **more}


def _entry(field: Field, bytes_: float, took: float, scores: Entry) -> Entry:
    return {"bytes_per_task": bytes_, "fraction": bytes_ / field.expert_bytes, **scores, "fit_s": took}


def all_rows(field: Field, folder: Path, merged: Path, suite: str, *, rivals: bool) -> Iterator[Row]:
    """The merged checkpoint alone, retex, and every rival at every size."""
    mine, refined = (digest(*(ROOT / "src/retex_cli" / each for each in part)) for part in (DECIDING, REFINING))
    yield Row("merged", "alone", mine, lambda: _entry(field, 0, 0, field.scores(lambda _: field.tensors(field.merged))))
    for name, options in OURS.items():
        trained = "--refine" in options
        sources = refined if trained else mine
        for budget in BUDGETS if rivals and not trained else REFINED[suite]:
            yield Row(name, budget, sources, lambda b=budget, o=options: ours(field, folder, merged, b, o))
    if not rivals:
        return
    case = cache(field.case)
    theirs = digest(Path(__file__).parent / "rivals")
    for form in forms(len(field.tasks)):
        yield Row(form.name, form.size, theirs, lambda form=form: rival(field, case(), form))


def digest(*places: Path) -> str:
    """Of sources: files, and all of them in folders."""
    state = hashlib.sha256()
    for place in places:
        for file in [place] if place.is_file() else sorted(place.rglob("*.py")):
            state.update(file.read_bytes())
    return state.hexdigest()


def chosen(name: str, names: str | None) -> bool:
    """Whether a comma-separated choice holds ``name``; no choice holds all."""
    return names is None or name in names.split(",")


def replaced(known: Sequence[Entry], entries: Sequence[Entry]) -> list[Entry]:
    """``known`` rows, with ``entries`` in place of those of the same form and size."""
    rows = {(entry["form"], entry["size"]): entry for entry in (*known, *entries)}
    return list(rows.values())


def place(suite: str, fingerprint: str, row: Row) -> Path:
    """Where a row is kept: outside the repository, by everything that decides it."""
    decided = " ".join([fingerprint, row.form, row.size, row.sources])
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retex" / "benchmarks"
    return home / f"pareto-{suite}" / f"{row.form}-{hashlib.sha256(decided.encode()).hexdigest()[:16]}.json"


def run(rows: Iterable[Row], kept: Callable[[Row], Path], fresh: bool) -> list[Entry]:
    """Every row, from the cache where it is there; each is kept as soon as it is measured."""
    entries = []
    for row in rows:
        file = kept(row)
        if file.is_file() and not fresh:
            entry = json.loads(file.read_text())
        else:
            made = {key: provenance()[key] for key in ("commit", "processor")}
            entry = {"form": row.form, "size": row.size, **row.measured(), **made}
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(entry))
        entries.append(entry)
        print(
            f"{row.form} {row.size}: {entry['bytes_per_task']:,.0f} bytes a task, {100 * entry['fraction']:.3f} %, "
            f"mean {100 * entry['mean']:.2f} %, worst {100 * entry['worst']:.2f} %, "
            f"agreement {100 * entry['agreement']:.2f} %",
            flush=True,
        )
    return entries


def main() -> None:
    """Read the command line, measure, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=REFINED)
    parser.add_argument("--rows", type=int, help="test rows a task, drawn once; default: all")
    parser.add_argument("--forms", help="only these, by comma")
    parser.add_argument("--sizes", help="only these, by comma")
    parser.add_argument("--merge", default="average", metavar="METHOD", help="what all start from")
    parser.add_argument("--alpha", metavar="X|auto", help="its scale; default: the method's own")
    parser.add_argument("--seed", type=int, default=0, help="of the fine-tuning")
    parser.add_argument("--fresh", action="store_true", help="measure again what the cache has")
    arguments = parser.parse_args()
    suite = arguments.suite + (f"-seed{arguments.seed}" if arguments.seed else "")
    folder = ROOT / ".demo" / suite
    make = [str(ROOT / "examples/suites/make.py"), arguments.suite, str(folder), "--seed", str(arguments.seed)]
    subprocess.run([sys.executable, *make], check=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        merged = Path(name) / "merged.safetensors"
        scale = ("--alpha", arguments.alpha) if arguments.alpha else ()
        retex(folder, "merge", "--method", arguments.merge, *scale, "-o", str(merged))
        field = Field(folder, merged, arguments.rows)
        alone = arguments.merge == "average" and not scale and not arguments.seed
        every = all_rows(field, folder, merged, arguments.suite, rivals=alone)
        rows = [row for row in every if chosen(row.form, arguments.forms) and chosen(row.size, arguments.sizes)]
        fingerprint = field.fingerprint()
        entries = run(rows, lambda row: place(suite, fingerprint, row), arguments.fresh)
    key = suite + ("" if arguments.merge == "average" else f" on {arguments.merge}")
    key += f" (alpha {arguments.alpha})" if scale else ""
    key += f", {arguments.rows} rows" if arguments.rows else ""
    result = {name: value for name, value in (load(NAME) or {}).items() if name != "provenance"}
    known = cast("list[Entry]", result.get(key, []))
    entries = replaced(known, entries)
    print(f"wrote {write(NAME, {**result, key: entries})}")
    if alone:
        print(f"wrote {plot(key, entries)}")


if __name__ == "__main__":
    main()
