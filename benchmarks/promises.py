"""Is a bigger offsets file ever worse than a smaller one, or worse than merged weights alone?

    python benchmarks/promises.py text8|vision6|restoration [--rows 1000] [--tasks a,b] [--fresh]

Ten budgets from 0.02 % to 30 % for every task, data-free and with the task's unlabelled inputs (which then choose among
fits; nothing is trained on them), over the plain average. Each recovered expert answers the task's test inputs, and
its answers are compared with the expert's own: on how many it agrees, or for images how near it is in decibels, and the
distance that ``models/compare.py`` defines. A row is worse than a smaller one where the distances of its answers are
larger in the geometric mean, and clearly worse where that mean is more than two standard errors of paired differences
away. Rows that were measured with the same sources and experts come from the cache. Writes
``results/promises-SUITE.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from field import drawn
from pareto import digest
from record import ROOT, write
from torch import Tensor

import retex_cli
from retex_cli import RetexError
from retex_cli.commands.expert_models import ExpertModels
from retex_cli.commands.fitting import Fitting, scratch_beside
from retex_cli.commands.guard import Guard
from retex_cli.commands.offsets_file import layout_of
from retex_cli.commands.refine import RefineInputs, refine_inputs
from retex_cli.commands.task_fit import TaskFit, Wish, match_experts
from retex_cli.commands.weigher import Weigher
from retex_cli.io.artefact import Stored
from retex_cli.io.checkpoint import open_checkpoint
from retex_cli.io.inputs import Example, read_rows
from retex_cli.models.compare import apart
from retex_cli.models.device import choose_device
from retex_cli.models.distil import answer_of
from retex_cli.models.network import Network
from retex_cli.models.passes import run
from retex_cli.models.processor import Inputs
from retex_cli.offsets.predict import Predictor
from retex_cli.offsets.stream import decode
from retex_cli.parallel import thread_count
from retex_cli.progress import Silent
from retex_cli.workspace import Workspace

BUDGETS = ("0.02%", "0.05%", "0.1%", "0.25%", "0.5%", "1%", "2%", "5%", "10%", "30%")
MODES = ("data-free", "with inputs")
ALONE = "0"
CLEAR = 2.0
"""Standard errors from which on a difference is outside the noise."""
BATCH = 32

Entry = dict[str, object]


@dataclass(frozen=True)
class Ground:
    """One task: its expert's network, and the expert's own answers to the test inputs."""

    task: str
    network: Network
    rows: Sequence[Example]
    wanted: Tensor

    def answers(self) -> Tensor:
        """Of the network as it is filled now."""
        return answers(self.network, self.rows)

    def compared(self) -> Entry:
        """The network's answers with the expert's: every input's distance, and agreement or decibels."""
        found = self.answers()
        entry: Entry = {"logs": apart(found, self.wanted).log().tolist()}
        if self.wanted.ndim == 2:
            return {**entry, "near": float((found.argmax(1) == self.wanted.argmax(1)).double().mean())}
        errors = (found - self.wanted).flatten(1).square().mean(1).clamp_min(1e-12)
        return {**entry, "near": float(-10 * errors.log10().mean())}


def answers(network: Network, rows: Sequence[Example]) -> Tensor:
    """Of all rows, on the CPU."""

    def forward(inputs: Inputs) -> Tensor:
        with torch.inference_mode():  # float32: fits of large budgets are nearer than bfloat16 shows
            return answer_of(network.module(**inputs)).float().cpu()

    return run(network, rows, forward, BATCH, thread_count(None), Silent()).whole()


class Suite:
    """The workspace ``folder``, its experts over their plain average, which is written to the file ``merged``, and test
    inputs, at most ``rows`` a task."""

    def __init__(self, folder: Path, merged: Path, rows: int | None) -> None:
        self.folder, self.rows = folder, rows
        self.space = Workspace.load(folder)
        self.experts = self.space.with_experts({})
        self.merged_file = merged
        retex_cli.merge(self.space.need_base(None), self.experts, str(self.merged_file), model=self.space.model)
        self.merged = open_checkpoint(str(self.merged_file))
        self.inputs = self.space.with_inputs({})
        self.device = choose_device("auto", Silent())

    def fit(self, task: str, budget: str) -> TaskFit:
        """What is to be fitted. RetexError for an expert that is not the merged checkpoint's."""
        [found] = match_experts({task: self.experts[task]}, self.merged, None, Wish(budget))
        return found

    def ground(self, task: str) -> Ground:
        """See ``Ground``."""
        models, tests = self.models(self.fit(task, BUDGETS[-1])), self.tests(task)
        network = models.network(task)
        models.load_expert(network, task)
        return Ground(task, network, tests, answers(network, tests))

    def tests(self, task: str) -> Sequence[Example]:
        """Labels, or what is clean in an image, are left out: answers are compared with the expert's."""
        named = self.space.field("test", {})  # of images there are no labels, so no `test`
        rows = read_rows(Path(named.get(task, str(self.folder / f"data/{task}-test.safetensors"))))
        only = [
            Example(text=row.text, tensors=row.tensors and {"pixel_values": row.tensors["pixel_values"]}, source=task)
            for row in rows
        ]
        return drawn(only, self.rows)

    def models(self, fit: TaskFit) -> ExpertModels:
        """The one expert as a network."""
        return ExpertModels({fit.task: fit.expert}, {fit.task: fit.alignment}, self.device, self.space.model)

    def measure(self, ground: Ground, budget: str, mode: str) -> Entry:
        """One row. A budget that holds nothing is said in ``error``: nothing is written then."""
        fit = self.fit(ground.task, budget if budget != ALONE else BUDGETS[-1])
        data, kept = b"", {}
        if budget != ALONE:
            given = refine_inputs([fit.task], self.inputs, Wish(budget), mode == MODES[1])
            try:
                data, kept = self.fitted(fit, given)
            except RetexError as error:
                return {"error": error.message}
        factors = {fit.task: decode(data, layout_of(self.merged))} if data else {fit.task: {}}
        predictor = Predictor(factors)
        recovered = {
            name: predictor.add_to(name, self.merged.read(name), {fit.task: 1.0}, self.device)
            for name in fit.alignment.shared
        }
        self.models(fit).load_merged(ground.network, fit.task, recovered)
        return {"bytes": len(data), "kept": kept, **ground.compared()}

    def fitted(self, fit: TaskFit, inputs: Mapping[str, RefineInputs]) -> tuple[bytes, Mapping[str, object]]:
        """Coded offsets as ``retex fit-offsets`` makes them, and what its report says of them."""
        threads, progress = thread_count(None), Silent()
        without = frozenset({"training"})
        given = {task: each.rows for task, each in inputs.items()}
        with tempfile.TemporaryDirectory() as name, scratch_beside(f"{name}/offsets", {}, self.device) as scratch:
            weigher = Weigher(self.models(fit), layout_of(self.merged), given, threads, scratch)
            guard = Guard.of([fit], weigher, self.merged, progress, without)
            fitting = Fitting(self.merged, self.device, threads, scratch, progress, weigher, guard=guard)
            [fitted] = fitting.fit([fit])
            stored = fitted.tensors[f"offsets/{fit.task}"]
            tensor = stored.read() if isinstance(stored, Stored) else stored
            return tensor.numpy().tobytes(), fitted.kept or {}


def cached(place: Path, measure: Callable[[], Entry], fresh: bool) -> Entry:
    """What was measured before, or is measured now and kept."""
    if place.is_file() and not fresh:
        found = json.loads(place.read_text())
        assert isinstance(found, dict)
        return found
    entry = measure()
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(entry))
    return entry


def violations(rows: Sequence[Entry]) -> Iterator[Entry]:
    """Of one task and mode, rows in order of their budgets from the merged weights alone on: every row that is worse
    than the best smaller one, by which share, and whether that is clear of the noise."""
    best: Entry | None = None
    for row in rows:
        if "logs" not in row:
            continue
        if best is not None:
            worse = _logs(row) - _logs(best)
            error = float(worse.std()) / math.sqrt(len(worse))
            mean = float(worse.mean())
            if mean > 0:
                same = {key: row[key] for key in ("task", "mode", "budget")}
                yield {**same, "than": best["budget"], "by": math.expm1(mean), "clear": mean > CLEAR * error}
        if best is None or float(_logs(row).mean()) <= float(_logs(best).mean()):
            best = row


def _logs(row: Entry) -> Tensor:
    return torch.tensor(row["logs"], dtype=torch.float64)


def told(row: Entry) -> Entry:
    """A row without its many numbers: ``distance`` is their geometric mean."""
    if "logs" not in row:
        return row
    return {**{key: value for key, value in row.items() if key != "logs"}, "distance": float(_logs(row).mean().exp())}


def made(name: str) -> Path:
    """The suite's workspace."""
    folder = ROOT / ".demo" / name
    if (folder / "retex.toml").is_file():
        return folder
    script, *suite = ("restoration.py",) if name == "restoration" else ("make.py", name)
    subprocess.run([sys.executable, str(ROOT / "examples/suites" / script), *suite, str(folder)], check=True)
    return folder


@contextmanager
def importing(folder: Path) -> Iterator[None]:
    """Where the suite's module that builds its network can be imported."""
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(folder.resolve()))


def fingerprint(suite: Suite, task: str) -> str:
    """Of the expert's folder, which its recipe names, the merged checkpoint, the test rows and the sources."""
    state = hashlib.sha256(digest(ROOT / "src").encode())
    state.update(f"{Path(suite.experts[task]).resolve().name} {suite.rows}".encode())
    state.update(suite.merged_file.read_bytes())
    return state.hexdigest()[:16]


def main() -> None:
    """Read the command line, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=("text8", "vision6", "restoration"))
    parser.add_argument("--rows", type=int, help="test rows a task, drawn once; default: all")
    parser.add_argument("--tasks", help="only these, by comma; then nothing is written")
    parser.add_argument("--fresh", action="store_true", help="measure again what the cache has")
    arguments = parser.parse_args()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retex" / "benchmarks"
    rows: list[Entry] = []
    folder = made(arguments.suite)
    with importing(folder), tempfile.TemporaryDirectory() as place:
        suite = Suite(folder, Path(place) / "merged.safetensors", arguments.rows)
        tasks = arguments.tasks.split(",") if arguments.tasks else list(suite.experts)
        for task in tasks:
            decided, ground = fingerprint(suite, task), suite.ground(task)
            for mode in MODES:
                for budget in (ALONE, *BUDGETS):
                    place = home / f"promises-{arguments.suite}" / f"{task}-{mode[:4]}-{budget}-{decided}.json"
                    entry = cached(place, lambda b=budget, m=mode, g=ground: suite.measure(g, b, m), arguments.fresh)
                    rows.append({"task": task, "mode": mode, "budget": budget, **entry})
                    print(" ".join(f"{key} {value}" for key, value in told(rows[-1]).items()), flush=True)
    found = [
        violation
        for task in tasks
        for mode in MODES
        for violation in violations([row for row in rows if (row["task"], row["mode"]) == (task, mode)])
    ]
    for violation in found:
        print("worse:", violation)
    if not arguments.tasks:
        images = arguments.suite == "restoration"
        result = {"rows_per_task": arguments.rows, "near": "PSNR, dB" if images else "agreement"}
        result |= {"rows": [told(row) for row in rows], "violations": found}
        print("wrote", write(f"promises-{arguments.suite}", result))


if __name__ == "__main__":
    main()
