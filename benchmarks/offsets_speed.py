"""Fitting offsets to large models and recovering from them: whole processes, beside a plain copy of the same bytes.

    python benchmarks/offsets_speed.py --check                       base and 8 experts of 124 M float32 parameters
    python benchmarks/offsets_speed.py --model llama-1b --check      base and 3 of 1.1 B in bfloat16, in shards
    python benchmarks/offsets_speed.py --folder F                    make the models there, once, and leave them

Random weights with task vectors of white noise, whose spectra are flat: the hardest case for a decomposition that looks
for leading components alone. Start is a process that only plans the recovery; a plain copy is on the disk when it ends,
as what retex writes is; they take turns, and medians count. Writes ``results/offsets_speed.json``, one entry a model.
With ``--check`` the exit status is 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import RETEX, beside_copy, run
from record import RESULTS, provenance, write
from shapes import LAYERS, make

from retex_cli.io.checkpoint import open_checkpoint

Measured = dict[str, float]


def offsets_file(budget: str) -> str:
    """The offsets of all experts within ``budget``, in the models' folder."""
    return f"offsets-{budget.removesuffix('%')}.safetensors"


@dataclass(frozen=True)
class Subject:
    """What is measured, and the bars: seconds and anonymous MB of a fit, and how many copies a recovery may take."""

    experts: int
    dtype: torch.dtype
    shard: int
    budgets: tuple[str, ...]
    fit_seconds: float
    fit_mb: float
    copies: float = 1.5


SUBJECTS = {
    "gpt2": Subject(8, torch.float32, sys.maxsize, ("0.1%", "0.25%"), 180, 2000),
    "llama-1b": Subject(3, torch.bfloat16, 1_000_000_000, ("0.25%",), float("inf"), 24_000),
}


@contextlib.contextmanager
def models(folder: Path | None, name: str) -> Iterator[Path]:
    """The folder with base and experts, which stays if it was named."""
    with contextlib.ExitStack() as stack:
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        subject = SUBJECTS[name]
        if not (place / f"expert{subject.experts - 1}" / "config.json").is_file():
            make(place, name, LAYERS[name], subject.experts, subject.dtype, subject.shard)
        yield place


def command(folder: Path, *arguments: str) -> Measured:
    """One run of retex."""
    found = run([*RETEX, *arguments, "--device", "cpu", "--quiet"], folder=folder)
    assert found is not None
    return {key: round(value, 3) for key, value in found.items()}


def measured(folder: Path, name: str, repeat: int) -> dict[str, object]:
    """Merge, fit at every budget, recover."""
    subject = SUBJECTS[name]
    experts = [word for k in range(subject.experts) for word in ("--expert", f"expert{k}={folder}/expert{k}")]
    merge = command(folder, "merge", "--base", f"{folder}/base", *experts, "-o", "merged", "--overwrite")
    print(f"merge: {merge}", flush=True)
    fits = {}
    for budget in subject.budgets:
        given = ("--merged", "merged", *experts, "--budget", budget, "-o", offsets_file(budget), "--overwrite")
        fits[budget] = command(folder, "fit-offsets", *given)
        fits[budget]["file_mb"] = (folder / offsets_file(budget)).stat().st_size / 1e6
        print(f"fit within {budget}: {fits[budget]}", flush=True)
    merged = open_checkpoint(folder / "merged")
    parameters = sum(info.numel for info in merged.tensors.values())
    kind = str(subject.dtype).removeprefix("torch.")
    what = f"a base and {subject.experts} experts of {parameters / 1e6:,.0f} M {kind} parameters"
    made = {"what": what, "merged_mb": merged.nbytes / 1e6, "merge": merge, "fit": fits}
    return {**made, "fit_commit": provenance()["commit"], **recovered(folder, name, repeat)}


def recovered(folder: Path, name: str, repeat: int) -> dict[str, object]:
    """Recovery within every budget, a process that only plans it, and a plain copy: see ``beside_copy``."""
    recover = (*RETEX, "recover", "--merged", "merged", "--task", "expert0", "-o", "back", "--device", "cpu", "--quiet")
    lines = {budget: (*recover, "--offsets", offsets_file(budget)) for budget in SUBJECTS[name].budgets}
    sides = {"start": (*next(iter(lines.values())), "--dry-run"), **lines}
    found, copy = beside_copy(sides, folder / "back", folder / "merged", folder=folder, turns=repeat)
    start, made = found.pop("start"), provenance()
    print(f"{found}, start {start}, copy {copy:.3f} s", flush=True)
    times = {"copy_s": copy, "recover": found, "start": start}
    return {**times, "commit": made["commit"], "processor": made["processor"]}


def missed(name: str, found: dict[str, object]) -> list[str]:
    """One line for each bar that is missed; empty if none is."""
    subject, lines = SUBJECTS[name], []
    fits, recover, copy = (found[key] for key in ("fit", "recover", "copy_s"))
    assert isinstance(fits, dict)
    assert isinstance(recover, dict)
    assert isinstance(copy, float)
    for budget, fit in fits.items():
        if fit["wall_s"] > subject.fit_seconds:
            lines.append(f"fit within {budget}: {fit['wall_s']:.0f} s, not {subject.fit_seconds:.0f}")
        if fit["anon_mb"] > subject.fit_mb:
            lines.append(f"fit within {budget}: {fit['anon_mb']:.0f} MB of anonymous memory, not {subject.fit_mb:.0f}")
    for budget, one in recover.items():
        if one["beyond_start_s"] > subject.copies * copy:
            copies = one["beyond_start_s"] / copy
            lines.append(f"recover within {budget}: {copies:.2f} copies beyond a start, not {subject.copies:g}")
    return lines


def kept(name: str, found: dict[str, object]) -> dict[str, object]:
    """The record with this model's entry in the place of its last one."""
    return {"models": {**before(), name: found}}


def before() -> dict[str, dict[str, object]]:
    """What was measured last, by model."""
    path = RESULTS / "offsets_speed.json"
    found: dict[str, dict[str, object]] = json.loads(path.read_text())["models"] if path.is_file() else {}
    return found


def main() -> None:
    """Read the command line, measure, print, write, check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(SUBJECTS), default="gpt2")
    parser.add_argument("--folder", type=Path, help="where the models are made and left; default: a temporary folder")
    parser.add_argument("--repeat", type=int, default=3, help="turns of recovery, start and copy; medians count")
    parser.add_argument(
        "--recovery", action="store_true", help="only recover, from what --folder has of an earlier run"
    )
    parser.add_argument("--make", action="store_true", help="only make the models")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    arguments = parser.parse_args()
    with models(arguments.folder, arguments.model) as folder:
        if arguments.make:
            return
        if arguments.recovery:
            last = before()[arguments.model]
            fitted = {"fit_commit": last.get("fit_commit", last["commit"])}
            found = {**last, **fitted, **recovered(folder.absolute(), arguments.model, arguments.repeat)}
        else:
            found = measured(folder.absolute(), arguments.model, arguments.repeat)
    print(f"wrote {write('offsets_speed', kept(arguments.model, found))}")
    lines = missed(arguments.model, found)
    for line in lines:
        print(f"missed: {line}")
    if arguments.check and lines:
        sys.exit(1)


if __name__ == "__main__":
    main()
