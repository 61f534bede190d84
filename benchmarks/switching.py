"""Switching a loaded model between experts, beside copying weights into it.

    python benchmarks/switching.py [FOLDER]

MiniLM-L6 and two experts of suite text4, offsets of 0.25 % of an expert. Every figure is the best of repeated calls in
one process: a plain copy of all weights into the model, the merged weights, an expert after another, a mix of two; the
first switch decodes the offsets, too. Writes ``results/switching.json``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from record import write
from recovery import TASKS, best_seconds, workspace
from safetensors.torch import load_file
from transformers import AutoModel

import retex_cli


def best_ms(function: Callable[[], None]) -> float:
    """Milliseconds of one call, the best of some."""
    return 1e3 * best_seconds(function, time.perf_counter)


def measured(folder: Path, threads: int) -> dict[str, object]:
    """Everything on ``threads`` threads."""
    torch.set_num_threads(threads)
    model = AutoModel.from_pretrained(folder / "merged")
    weights = load_file(folder / "merged" / "model.safetensors")
    own = {name: value for name, value in model.state_dict().items() if name in weights}
    predictor = retex_cli.Predictor.load(
        str(folder / "merged"), str(folder / "offsets.safetensors"), device="cpu", threads=threads
    )

    def copy() -> None:
        for name, value in own.items():
            value.copy_(weights[name])

    one, other = TASKS
    started = time.perf_counter()
    predictor.apply_(model, one, head=False)
    first = 1e3 * (time.perf_counter() - started)
    predictor.apply_(model, other, head=False)
    found = {
        "threads": threads,
        "copy_ms": best_ms(copy),
        "first_ms": first,
        "expert_ms": best_ms(lambda: predictor.apply_(model, one, head=False)),
        "merged_ms": best_ms(lambda: predictor.apply_(model, None)),
        "mix_ms": best_ms(lambda: predictor.apply_(model, {one: 0.7, other: 0.3}, head=False)),
        "weights_mb": sum(value.nbytes for value in weights.values()) / 1e6,
        "held_mb": predictor.nbytes / 1e6,
    }
    return {**found, "times_copy": found["expert_ms"] / found["copy_ms"]}


def main() -> None:
    """Measure, print and write."""
    with workspace() as folder:
        rows = [measured(folder, threads) for threads in (1, 2)]
    for row in rows:
        print({name: round(value, 2) for name, value in row.items()})
    print(f"wrote {write('switching', {'rows': rows})}")


if __name__ == "__main__":
    main()
