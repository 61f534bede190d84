"""What an answer by the right expert costs beside one forward pass of the merged model.

    python benchmarks/serving.py FOLDER [--device cuda]

``FOLDER`` is a workspace of suite text4 with its three artefacts; it is made where there is none. For groups of 1 to 64
short texts of one task, in milliseconds of the wall clock on torch's own threads, tokenising included, the best of
repeated calls: one pass of the merged model, identification alone, an ``Experts`` call whose expert is at hand, and one
that has to switch from another task's; one expert an input, however unsure its task. Writes ``results/serving.json``;
a device that was not measured keeps its rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from record import ROOT, write
from recovery import retex
from tables import load

from retex_cli import Experts
from retex_cli.commands.experts import HERE
from retex_cli.commands.identifier import Identifier, SignaturesFile, encoder_of
from retex_cli.io.inputs import Example
from retex_cli.progress import Silent

TASKS = ("election", "movie")
GROUPS = (1, 2, 4, 8, 16, 32, 64)
ROUNDS = 6
LONGEST = 160
"""Characters: what both networks read whole."""

ARTEFACTS = ("merged", "offsets.safetensors", "signatures.safetensors")


def workspace(folder: Path) -> list[str]:
    """The artefacts in a folder, made if they are not there."""
    if not (folder / "retex.toml").is_file():
        subprocess.run([sys.executable, str(ROOT / "examples/suites/make.py"), "text4", str(folder)], check=True)
    for name, command in zip(ARTEFACTS, ("merge", "fit-offsets", "build-signatures"), strict=True):
        if not (folder / name).exists():
            retex(folder, command)
    return [str(folder / name) for name in ARTEFACTS]


def texts(folder: Path, experts: Experts, task: str) -> list[str]:
    """As many short reference inputs as the largest group has, all of which are identified right."""
    rows = (folder / f"data/{task}-reference.jsonl").read_text().splitlines()
    short = [text for text in (json.loads(row)["text"] for row in rows) if len(text) <= LONGEST]
    right = [text for text, reply in zip(short, experts(short), strict=True) if reply.task == task]
    return right[: max(GROUPS)]


def in_turns(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds of each, the best of some rounds: what disturbs one call disturbs few of the others."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            call()  # what ran before has left other weights in the cache
            started = time.perf_counter()
            call()
            best[name] = min(best[name], 1e3 * (time.perf_counter() - started))
    return best


def measured(folder: Path, device: str) -> dict[str, object]:
    """A row per size of the group."""
    files = workspace(folder)
    experts = Experts.load(*files, device=device, blend=False)
    file = SignaturesFile.open(files[2])
    encoder = encoder_of(file.encoder(files[0]), torch.device(device), HERE, model=None, max_length=file.max_length)
    identifier, network = Identifier(file.signatures, encoder, max(GROUPS), file.shapes), encoder.network
    one, other = (texts(folder, experts, task) for task in TASKS)
    rows = []
    for group in GROUPS:
        mine, others = one[:group], other[:group]
        examples = [Example(text=text) for text in mine]

        def forward(examples: list[Example] = examples) -> None:
            with network.inference():
                network.module(**network.inputs(examples))
            if device == "cuda":
                torch.cuda.synchronize()

        def taking_turns(mine: list[str] = mine, others: list[str] = others) -> None:
            experts(mine)
            experts(others)

        calls: dict[str, Callable[[], object]] = {
            "forward_ms": forward,
            "identify_ms": lambda examples=examples: identifier.identify(examples, Silent()),
            "same_ms": lambda mine=mine: experts(mine),
            "switched_ms": taking_turns,
        }
        found = in_turns(calls)
        rows.append({"group": group, **found, "switched_ms": found["switched_ms"] / 2})
        print(device, {name: round(value, 2) for name, value in rows[-1].items()}, flush=True)
    return {"rows": rows, "threads": torch.get_num_threads(), "held_mb": experts.nbytes / 1e6}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    known = (load("serving") or {}).get("devices", {})
    assert isinstance(known, dict)
    found = {**known, arguments.device: measured(arguments.folder, arguments.device)}
    print(f"wrote {write('serving', {'devices': found})}")


if __name__ == "__main__":
    main()
