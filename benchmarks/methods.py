"""What every merge method leaves of the experts: accuracy of the merged checkpoint alone, with each task's own head.

    python benchmarks/methods.py text8|vision6 [--rows 500] [--methods ties,esm] [--fresh]

Every method is merged by the command line at its default scale and, where it takes one, at ``alpha = auto`` (chosen by
agreement with the experts on held-out inputs; no labels, no test data); networks with BatchNorm also with its running
statistics re-estimated from the tasks' inputs, which the chosen scale then has too. Rows are kept in the cache, with
the commit they were measured at, until ``--fresh`` asks for them again. The suite is made first if it is not there;
results go to ``results/methods-SUITE.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import measure
import torch
from record import ROOT, provenance, write

from retex_cli.commands.expert_models import ExpertModels
from retex_cli.io.align import align
from retex_cli.io.checkpoint import Checkpoint, open_checkpoint, open_expert
from retex_cli.io.inputs import Example, read_rows
from retex_cli.merging.table import METHODS, Method
from retex_cli.models.classifier import classify
from retex_cli.models.device import choose_device
from retex_cli.parallel import thread_count
from retex_cli.progress import Silent
from retex_cli.workspace import Workspace

VARIANTS = {
    "esm (roberta)": ("esm", ["--set=variant=roberta"]),
    "esm (256 inputs)": ("esm", ["--samples=256"]),
    "esm (no scalings)": ("esm", ["--set=tasks=off", "--set=columns=off", "--set=layers=off"]),
    "task_arithmetic + lines": ("task_arithmetic", ["--set=lines=1"]),
}
"""Rows beside the methods themselves: name -> method and what is typed."""

REESTIMATED = ["--batchnorm", "reestimate"]
FEW = ["--samples", "64"]
"""Inputs of a task for BatchNorm alone: enough for means and variances."""


def drawn(rows: list[Example], count: int) -> list[Example]:
    """At most ``count`` rows, the same at every call: files may be sorted by label."""
    return rows if len(rows) <= count else random.Random(0).sample(rows, count)


class Bench:
    """One suite: its experts, their own accuracies, and test rows."""

    def __init__(self, folder: Path, rows: int) -> None:
        space = Workspace.load(folder)
        sys.path.insert(0, str(folder))  # where the module lies that builds a network of its own
        self.base: Checkpoint = open_checkpoint(space.need_base(None))
        references = space.with_experts({})
        experts = {task: open_expert(reference, self.base) for task, reference in references.items()}
        alignments = {task: align(self.base, expert) for task, expert in experts.items()}
        self.models = ExpertModels(experts, alignments, choose_device("auto", Silent()), space.model)
        self.tests = {task: drawn(read_rows(path), rows) for task, path in space.with_tests({}).items()}
        self.has_batchnorm = any(name.endswith("running_mean") for name in self.base.tensors)
        self.expert = {task: self._accuracy(task, rows, None) for task, rows in self.tests.items()}

    def scores(self, weights: Mapping[str, torch.Tensor]) -> dict[str, object]:
        """Share of each expert's accuracy that merged ``weights`` keep: mean, worst, and per task."""
        shares = {task: self._accuracy(task, rows, weights) / self.expert[task] for task, rows in self.tests.items()}
        return {"mean": sum(shares.values()) / len(shares), "worst": min(shares.values()), "tasks": shares}

    def _accuracy(self, task: str, rows: list[Example], merged: Mapping[str, torch.Tensor] | None) -> float:
        network = self.models.network(task)
        if merged is None:
            self.models.load_expert(network, task)
        else:
            self.models.load_merged(network, task, merged)
        answers = classify(network, rows, 64, thread_count(None), Silent()).argmax(1).tolist()
        return sum(network.labels[a] == row.label for a, row in zip(answers, rows, strict=True)) / len(rows)


def one(bench: Bench, suite: Path, options: list[str]) -> dict[str, object]:
    """Merge in a process of its own, read what it chose, and score what it wrote."""
    with tempfile.TemporaryDirectory(dir=suite.parent) as name:
        output = Path(name) / "merged.safetensors"
        line = [*measure.RETEX, "merge", "-w", str(suite), "-o", str(output), "--quiet", *options]
        cost = measure.run(line, folder=Path(name))
        with open_checkpoint(output) as checkpoint:
            scale = json.loads(checkpoint.metadata["retex.recipe"]).get("scale")
            weights = {name: checkpoint.read(name) for name in checkpoint.tensors}
        return {
            **bench.scores(weights),
            **(cost or {}),
            "alpha": scale["alpha"] if scale else None,
            "commit": provenance()["commit"],
        }


def rows() -> dict[str, tuple[Method, list[str]]]:
    """Every row: its name, its method and what is typed for it."""
    plain = {name: (name, list[str]()) for name in METHODS if METHODS[name].needs != "two experts"}
    return {name: (METHODS[m], ["--method", m, *typed]) for name, (m, typed) in {**plain, **VARIANTS}.items()}


def variants(bench: Bench, name: str, method: Method, options: list[str]) -> dict[str, list[str]]:
    """What is measured of one row: its defaults, with BatchNorm re-estimated where there is one, a chosen scale."""
    found = {"default": options}
    more = [*REESTIMATED, *([] if method.needs_inputs else FEW)] if bench.has_batchnorm else []
    if more:
        found["batchnorm"] = [*options, *more]
    if any(option.name == "alpha" for option in method.options) and name not in VARIANTS:
        found["auto"] = [*options, *more, "--alpha", "auto"]
    return found


def cache(suite: str, count: int) -> Path:
    """Where rows are kept from run to run, each with the commit that it was measured at."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retex" / "benchmarks"
    return home / f"methods-{suite}-{count}.json"


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite")
    parser.add_argument("--rows", type=int, default=500, help="test rows a task, drawn at random")
    parser.add_argument("--methods", help="only these, by comma")
    parser.add_argument("--fresh", action="store_true", help="measure again what the cache has")
    arguments = parser.parse_args()
    folder = ROOT / ".demo" / arguments.suite
    make = ROOT / "examples/suites/make.py"
    subprocess.run([sys.executable, str(make), arguments.suite, str(folder)], check=True)
    bench = Bench(folder, arguments.rows)
    store = cache(arguments.suite, arguments.rows)
    known = json.loads(store.read_text()) if store.is_file() else {}
    chosen = set(arguments.methods.split(",")) if arguments.methods else None
    for name, (method, options) in rows().items():
        if chosen is not None and method.name not in chosen:
            continue
        for variant, typed in variants(bench, name, method, options).items():
            if variant in known.get(name, {}) and not arguments.fresh:
                continue
            known.setdefault(name, {})[variant] = result = one(bench, folder, typed)
            store.parent.mkdir(parents=True, exist_ok=True)
            store.write_text(json.dumps(known, indent=1))
            print(
                f"{name}, {variant}: mean {100 * result['mean']:.2f} %, worst {100 * result['worst']:.2f} %, "
                f"alpha {result['alpha']}, {result['wall_s']:.1f} s",
                flush=True,
            )
    weights = {name: bench.base.read(name) for name in bench.base.tensors}
    result = {"experts": bench.expert, "base": bench.scores(weights), "methods": known}
    counts = {task: len(rows) for task, rows in bench.tests.items()}
    print(f"wrote {write(f'methods-{arguments.suite}', {'test_rows': counts, **result})}")


if __name__ == "__main__":
    main()
