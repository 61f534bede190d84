"""How fast an expert comes back: the command beside a plain copy, its memory by the model's depth, the decoder alone.

    python benchmarks/recovery.py [FOLDER]

MiniLM-L6 and two experts of suite text4, offsets of 0.25 % of an expert, then the same shapes with more layers. Start
is a process that only plans the recovery; a plain copy is ``cp`` and ``sync`` of the merged weights, as what retex
writes is on the disk when it ends. Recovery, start and copy take turns, and the median of each counts: what recovery
takes beyond a start is less than two starts differ by. The decoder reads 5 million symbols of one level on one thread,
in seconds of the processor, the best of some. Writes ``results/recovery.json``.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from measure import RETEX, beside_copy, environment, run
from record import ROOT, write
from safetensors.torch import load_file, save_file

from retex_cli.offsets import coder
from retex_cli.offsets.quantiser import centroid_shifts, quantise
from retex_cli.offsets.stream import Coded, contexts, decode, encode, scale_code

TASKS = ("movie", "sms_spam")
REPEATS = 7
TURNS = 30
SYMBOLS = 5_000_000
LEVELS = (2, 6, 10)
LAYERS = (6, 24)


def retex(folder: Path, *arguments: str) -> None:
    """One command, its output thrown away."""
    subprocess.run(
        [*RETEX, *arguments, "--quiet"], cwd=folder, check=True, env=environment(), stdout=subprocess.DEVNULL
    )


def artefacts(scratch: Path) -> Path:
    """A workspace of suite text4 with ``merged/`` and ``offsets.safetensors`` of two of its experts, made only once."""
    if (scratch / "offsets.safetensors").is_file():
        return scratch
    subprocess.run([sys.executable, str(ROOT / "examples/suites/make.py"), "text4", str(scratch)], check=True)
    retex(scratch, "merge")
    experts = [word for task in TASKS for word in ("--expert", f"{task}=experts/{task}")]
    (scratch / "retex.toml").unlink()
    retex(scratch, "fit-offsets", "--merged", "merged", *experts, "--budget", "0.25%")
    return scratch


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """The artefacts in the folder that the command line names, which stays, or in a temporary one."""
    if len(sys.argv) > 1:
        Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
        yield artefacts(Path(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield artefacts(Path(scratch))


def commands(folder: Path) -> dict[str, dict[str, float] | float]:
    """``recover`` of one expert into a file, a process that only plans it, and a plain copy: see ``beside_copy``."""
    source, output = folder / "merged" / "model.safetensors", folder / "out.safetensors"
    command = (*RETEX, "recover", "--task", TASKS[0], "-o", output.name, "--quiet")
    sides = {"start": (*command, "--dry-run"), "recover": command}
    found, copy = beside_copy(sides, output, source, folder=folder, turns=TURNS)
    return {**found, "merged_mb": source.stat().st_size / 1e6, "copy_s": copy}


def deeper(folder: Path, layers: int) -> float:
    """Anonymous MB of ``recover`` for a model of the same shapes with so many layers, both sides of it random."""
    merged = load_file(folder / "merged" / "model.safetensors")
    block = {name: value for name, value in merged.items() if ".layer.0." in name}
    for k in range(6, layers):
        merged |= {name.replace(".layer.0.", f".layer.{k}."): value.clone() for name, value in block.items()}
    save_file(merged, folder / "deep.safetensors")
    expert = {n: v + 0.01 * torch.randn_like(v) if v.is_floating_point() else v for n, v in merged.items()}
    save_file(expert, folder / "expert.safetensors")
    del merged, expert
    given = ("--merged", "deep.safetensors", "--offsets", "deep-offsets.safetensors")
    fitted = ("--expert", "deep=expert.safetensors", "--budget", "0.25%", "-o", given[3], "--overwrite")
    retex(folder, "fit-offsets", *given[:2], *fitted)
    command = (*RETEX, "recover", *given, "--task", "deep", "-o", "out.safetensors", "--overwrite", "--quiet")
    side = run(command, folder=folder)
    assert side is not None
    return side["anon_mb"]


def decoder() -> list[dict[str, float]]:
    """Million symbols a second on one thread, of the entropy decoder alone and all the way to the factors."""
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    left, right = 24_000, 1_000
    rank = SYMBOLS // (left + right)
    rows = []
    for level in LEVELS:
        both = torch.randn(rank, left, generator=draw), torch.randn(rank, right, generator=draw)
        of_both = contexts(level, left, right)
        symbols = [quantise(vectors, context[0]) for vectors, context in zip(both, of_both, strict=True)]
        shifts = {
            context: centroid_shifts(vectors, found, context[0])
            for vectors, context, found in zip(both, of_both, symbols, strict=True)
        }
        coded = [Coded(level, scale_code(0.01), *pair) for pair in zip(*symbols, strict=True)]
        data = encode([coded], shifts)
        count = sum(map(len, coder.decode(data, max_symbols=2 * SYMBOLS)))
        row = {"level": level, "bits": 8 * len(data) / count, "symbols": count}
        for name, function in (
            ("symbols", partial(coder.decode, data, max_symbols=2 * SYMBOLS)),
            ("factors", lambda data=data: dict(decode(data, [("weight", (left, right))]))),
        ):
            row[f"{name}_m_per_s"] = count / best_seconds(function, time.process_time) / 1e6
        rows.append(row)
    return rows


def best_seconds(function: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of one call by a clock, the least of some."""
    times = []
    for _ in range(REPEATS):
        started = clock()
        function()
        times.append(clock() - started)
    return min(times)


def main() -> None:
    """Measure, print and write."""
    with workspace() as folder:
        found = {"decoder": decoder(), **commands(folder)}
        found["layers"] = {layers: deeper(folder, layers) for layers in LAYERS}
    for name, value in found.items():
        print(f"{name}: {value}")
    print(f"wrote {write('recovery', found)}")


if __name__ == "__main__":
    main()
