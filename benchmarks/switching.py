"""Switching a loaded model between experts, beside copying weights into it.

    python benchmarks/switching.py [FOLDER]

MiniLM-L6 and two experts of suite text4, offsets of 0.25 % of an expert, one thread, in milliseconds of the processor.
Every figure is the best of repeated calls in one process: a plain copy of all weights into the model, the merged
weights, an expert after another, a mix of two; the first switch decodes the offsets, too. Writes
``results/switching.json``.
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
    return 1e3 * best_seconds(function, time.process_time)


def measured(folder: Path) -> dict[str, float]:
    """Everything on one thread."""
    torch.set_num_threads(1)
    model = AutoModel.from_pretrained(folder / "merged")
    weights = load_file(folder / "merged" / "model.safetensors")
    own = {name: value for name, value in model.state_dict().items() if name in weights}
    predictor = retex_cli.Predictor.load(
        str(folder / "merged"), str(folder / "offsets.safetensors"), device="cpu", threads=1
    )

    def copy() -> None:
        for name, value in own.items():
            value.copy_(weights[name])

    one, other = TASKS
    started = time.process_time()
    predictor.apply_(model, one, head=False)
    first = 1e3 * (time.process_time() - started)
    predictor.apply_(model, other, head=False)
    found = {
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
        found = measured(folder)
    print({name: round(value, 2) for name, value in found.items()})
    print(f"wrote {write('switching', dict(found))}")


if __name__ == "__main__":
    main()
