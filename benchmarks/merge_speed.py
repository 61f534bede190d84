"""Wall time, CPU time and memory of every merge method, beside mergekit 0.1.5 and a plain copy of the same files.

    python benchmarks/merge_speed.py --check             everything that the README and docs/methods.md quote
    python benchmarks/merge_speed.py --methods ties,dare_ties --layers 4 --experts 3
    python benchmarks/merge_speed.py --flat              memory by number of layers and by --max-memory alone

Makes a base and experts shaped like GPT-2 or Llama (4.5 GB, removed at the end), reads all of them once so that both
tools find them in memory, and runs retex and mergekit in turn on the same files, each as a whole process, its output on
the same disk and deleted before the next. A pair of runs that takes less than 30 s is repeated; medians count. A run
at the default sizes is kept in ``results/merge_speed.json``, in the place of earlier ones. With ``--check`` the exit
status is 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bars
import peer
import torch
from measure import RETEX, run
from record import RESULTS, provenance, write
from shapes import make

REPEATED_BELOW = 30.0
"""Seconds: longer runs are taken once."""
LAYERS = (4, 8, 16)
FLAT = ("task_arithmetic", "ties", "dare_ties", "tsv_m")
BUDGETS = {"ties": (64, 128, 256), "dare_ties": (64, 128, 256), "tsv_m": (512, 768, 1024), "iso_c": (512, 768, 1024)}
"""MB of ``--max-memory`` that are tried, on four layers."""

SECTIONS = ("layers", "max_memory")

Measured = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Peer:
    """What mergekit calls the same merge: ``each`` expert's parameters, and those of the whole."""

    method: str
    each: dict[str, float]
    shared: dict[str, object]
    based: bool = True


@dataclass(frozen=True)
class Row:
    """One merge: retex's options (the defaults of the papers), mergekit's for the same, how many experts it takes."""

    options: tuple[str, ...] = ()
    peer: Peer | None = None
    experts: int | None = None


MEAN, SUM = {"normalize": True}, {"normalize": False}
ROWS = {
    "average": Row(peer=Peer("linear", {"weight": 1.0}, MEAN, based=False)),
    "task_arithmetic": Row(peer=Peer("task_arithmetic", {"weight": 0.4}, SUM)),
    "ties": Row(("--scope", "tensor"), Peer("ties", {"weight": 1.0, "density": 0.2}, MEAN)),
    "ties_global": Row(("--scope", "global")),
    "dare": Row(peer=Peer("dare_linear", {"weight": 0.4, "density": 0.1}, SUM)),
    "dare_ties": Row(peer=Peer("dare_ties", {"weight": 1.0, "density": 0.1}, MEAN)),
    "breadcrumbs": Row(peer=Peer("breadcrumbs", {"weight": 0.2, "density": 0.15, "gamma": 0.006}, SUM)),
    "della": Row(peer=Peer("della", {"weight": 1.0, "density": 0.7, "epsilon": 0.07}, {**MEAN, "lambda": 1.1})),
    "sce": Row(peer=Peer("sce", {}, {"select_topk": 0.1})),
    "model_stock": Row(peer=Peer("model_stock", {}, {})),
    "slerp": Row(peer=Peer("slerp", {}, {"t": 0.5}), experts=2),
    **{name: Row() for name in ("pcb", "consensus", "emr", "tsv_m", "iso_c", "iso_cts", "knots", "doge")},
}


@dataclass(frozen=True)
class Bench:
    """A folder with models in it, and how they are merged."""

    folder: Path
    experts: int
    dtype: str
    binaries: Path | None
    limit: float

    def files(self) -> list[Path]:
        """The weights of all models."""
        return sorted(self.folder.glob("*/model.safetensors"))

    def names(self, row: Row) -> list[str]:
        """The experts of a merge."""
        return [f"expert{i}" for i in range(row.experts or self.experts)]

    def retex(self, method: str, *more: str) -> dict[str, float] | None:
        """One merge by retex; None past the limit."""
        row, output = ROWS[method], self.folder / "merged"
        call = [*RETEX, "merge", "--quiet", "--device", "cpu", "--base", str(self.folder / "base"), "-o", str(output)]
        for name in self.names(row):
            call += ["--expert", f"{name}={self.folder / name}"]
        try:
            own = method.partition("_global")[0]
            return run([*call, "--method", own, *row.options, *more], folder=self.folder, limit=self.limit)
        finally:
            shutil.rmtree(output, ignore_errors=True)

    def mergekit(self, method: str) -> dict[str, float] | None:
        """The same merge by mergekit; None if it has none."""
        row, output, config = ROWS[method], self.folder / "theirs", self.folder / "theirs.yml"
        if row.peer is None or self.binaries is None:
            return None
        experts = [self.folder / name for name in self.names(row)]
        base = self.folder / "base" if row.peer.based else None
        if method == "slerp":  # the first of the two is what mergekit calls the base
            base = experts[0]
        config.write_text(peer.config(row.peer.method, base, experts, self.dtype, row.peer.each, row.peer.shared))
        try:
            return run(peer.command(self.binaries, config, output), folder=self.folder)
        finally:
            shutil.rmtree(output, ignore_errors=True)


def copied(files: list[Path], target: Path) -> float:
    """Seconds that a plain copy of the files takes, one after the other, each over the one before."""
    started = time.monotonic()
    for file in files:
        shutil.copyfile(file, target)
    seconds = time.monotonic() - started
    target.unlink()
    return seconds


def warm(files: list[Path]) -> None:
    """Read everything once."""
    for file in files:
        with file.open("rb") as opened:
            while opened.read(1 << 24):
                pass


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """Of each quantity, the middle one."""
    return {key: round(statistics.median(each[key] for each in runs), 3) for key in runs[0]}


def pair(bench: Bench, method: str, repeat: int) -> Measured:
    """Both sides of one method, in turn."""
    sides: dict[str, list[dict[str, float]]] = {}
    for _ in range(repeat):
        for side, measure in (("retex", bench.retex), ("mergekit", bench.mergekit)):
            longest = max((each["wall_s"] for each in sides.get(side, [])), default=0.0)
            if longest < REPEATED_BELOW and (found := measure(method)) is not None:
                sides.setdefault(side, []).append(found)
    return {side: medians(runs) for side, runs in sides.items()}


def line(method: str, measured: Measured, limit: float) -> str:
    """One method's numbers, and how many times less retex takes of each."""
    if "retex" not in measured:
        return f"{method:16} not done within {limit:.0f} s"
    shown = {
        side: f"{side} {found['wall_s']:6.1f} s {found['cpu_s']:6.1f} s {found['anon_mb']:5.0f} MB"
        for side, found in measured.items()
    }
    ratios = ""
    if "mergekit" in measured:
        ratios = "   ratios " + " ".join(f"{bars.ratio(measured, key):.1f}" for key in ("wall_s", "cpu_s", "anon_mb"))
    return f"{method:16} " + "   ".join(shown.values()) + ratios


def speeds(arguments: argparse.Namespace, bench: Bench) -> dict[str, Measured]:
    """Every method asked for."""
    found = {}
    for method in arguments.methods:
        measured = pair(bench, method, arguments.repeat)
        if "retex" in measured:
            found[method] = measured
        print(line(method, measured, bench.limit), flush=True)
    return found


def flat(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Peak anonymous MB of retex by number of layers, and beyond its floor by ``--max-memory`` (four layers)."""
    layers: dict[str, dict[str, float]] = {method: {} for method in FLAT}
    budgets: dict[str, dict[str, float]] = {}
    for count in LAYERS:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            make(Path(scratch), arguments.model, count, arguments.experts, arguments.dtype)
            bench = Bench(Path(scratch), arguments.experts, "", None, arguments.limit)
            for method in FLAT:
                if (found := bench.retex(method)) is not None:
                    layers[method][str(count)] = round(found["anon_mb"], 1)
                    print(f"{count} layers, {method}: {found['anon_mb']:.0f} MB", flush=True)
            if count == LAYERS[0]:
                budgets = within_budgets(bench)
    return {"layers": layers, "max_memory": budgets}


def within_budgets(bench: Bench) -> dict[str, dict[str, float]]:
    """Per method and budget in MB, what is held beyond a merge that is only planned."""
    found: dict[str, dict[str, float]] = {}
    for method, budgets in BUDGETS.items():
        floor = bench.retex(method, "--dry-run")
        for budget in budgets:
            held = bench.retex(method, "--max-memory", f"{budget}MB")
            if held is not None and floor is not None:
                found.setdefault(method, {})[str(budget)] = round(held["anon_mb"] - floor["anon_mb"], 1)
                print(f"{method} within {budget} MB: {found[method][str(budget)]:.0f} MB", flush=True)
    return found


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the models are made; default: the temporary folder")
    parser.add_argument("--model", choices=("gpt2", "llama"), default="gpt2")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--methods", type=lambda text: tuple(text.split(",")), default=tuple(ROWS))
    parser.add_argument("--repeat", type=int, default=3, help="of runs shorter than 30 s")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds after which a method of retex is given up")
    parser.add_argument("--flat", action="store_true", help="memory by layers and by --max-memory alone")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    parser.add_argument("--json", type=Path, help="write {method: {side: numbers}} here")
    parser.add_argument("--peer-venv", type=Path, default=peer.VENV, help="mergekit's environment; made if it is not")
    arguments = parser.parse_args()
    unknown = set(arguments.methods) - set(ROWS)
    if unknown:
        parser.error(f"unknown methods {', '.join(sorted(unknown))}; known are {', '.join(ROWS)}")
    usual = ("model", "layers", "experts", "dtype")
    arguments.usual = all(getattr(arguments, name) == parser.get_default(name) for name in usual)
    return arguments


def timed(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Make the models and measure every method on them."""
    binaries = peer.install(arguments.peer_venv.absolute())
    dtype = str(arguments.dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        bench = Bench(Path(scratch), arguments.experts, dtype, binaries, arguments.limit)
        parameters = make(bench.folder, arguments.model, arguments.layers, arguments.experts, arguments.dtype)
        files = bench.files()
        warm(files)
        copy = copied(files, bench.folder / "copy")
        what = f"a base and {arguments.experts} experts of {parameters / 1e6:.0f} M {dtype} parameters"
        size = sum(file.stat().st_size for file in files)
        print(f"{what}; a plain copy of the {size / 1e9:.1f} GB takes {copy:.1f} s", flush=True)
        return {"what": what, "bytes": size, "copy_s": round(copy, 3), "methods": speeds(arguments, bench)}


def kept(measured: dict[str, Any], versions: dict[str, str]) -> dict[str, object]:
    """What is recorded: the last record with this run's methods and sections in the place of its own.

    ``commits`` says of every method and section at which commit it was measured.
    """
    found = RESULTS / "merge_speed.json"
    before = json.loads(found.read_text()) if found.is_file() else {}
    new = [*measured.get("methods", {}), *(key for key in measured if key in SECTIONS)]
    methods = {**before.get("methods", {}), **measured.get("methods", {})}
    commits = {**before.get("commits", {}), **dict.fromkeys(new, provenance()["commit"])}
    return {**before, **measured, "mergekit": versions, "methods": methods, "commits": commits}


def main() -> None:
    """Read the command line, measure, print, write, check."""
    arguments = parsed()
    result: dict[str, Any] = {} if arguments.flat else timed(arguments, arguments.folder)
    if arguments.json:
        arguments.json.write_text(json.dumps(result.get("methods", {}), indent=1) + "\n")
    if arguments.flat or arguments.methods == tuple(ROWS):
        result |= flat(arguments, arguments.folder)
    if arguments.usual:
        print(f"wrote {write('merge_speed', kept(result, peer.versions(arguments.peer_venv)))}")
    missed = bars.missed(result)
    for text in missed:
        print(f"missed: {text}")
    if arguments.check and missed:
        sys.exit(1)


if __name__ == "__main__":
    main()
