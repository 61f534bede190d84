"""A suite's artefacts, and what its networks say of its inputs: features and answers, computed once and kept.

The folder is that of ``examples/demo.py``: merged with ``retex merge``, experts recovered from ``retex fit-offsets`` at
the suite's own budget.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import measure
import numpy as np
import torch
from record import ROOT
from torch import Tensor, nn

from retex_cli.commands.identifier import encoder_of
from retex_cli.commands.offsets_file import OffsetsFile
from retex_cli.commands.recover import tensors_of
from retex_cli.io.checkpoint import Checkpoint, open_checkpoint, open_expert
from retex_cli.io.inputs import Example, read_rows
from retex_cli.models.device import choose_device
from retex_cli.models.encoder import Encoder
from retex_cli.models.network import Network
from retex_cli.models.processor import Inputs, batches
from retex_cli.parallel import thread_count
from retex_cli.progress import Silent
from retex_cli.workspace import MERGED, OFFSETS, Workspace

DRAWS, LARGEST = 3, 256
"""Draws of the reference inputs, and how many there are in one."""

ANSWERED = 500
"""Test rows of a task that every expert answers, drawn at random; features are of all."""

Names = np.ndarray
"""Label names, one per input."""


class Suite:
    """``text8`` or ``vision6`` under ``folder``; everything slow is kept in ``cache``."""

    @classmethod
    def named(cls, name: str) -> Suite:
        """In its usual folder."""
        return cls(name, ROOT / ".demo" / name)

    def __init__(self, name: str, folder: Path) -> None:
        make = ROOT / "examples/suites/make.py"
        if not (folder / "retex.toml").is_file():
            subprocess.run([sys.executable, str(make), name, str(folder)], check=True)
        self.name, self.folder = name, folder
        self.space = Workspace.load(folder)
        self.tasks = sorted(self.space.tasks)
        sys.path.insert(0, str(folder.resolve()))  # the module that builds the network
        self.retex("merge", MERGED)
        self.retex("fit-offsets", OFFSETS)
        self.device = choose_device("cpu", Silent())
        self.base = open_checkpoint(self.space.need_base(None))
        self.merged = open_checkpoint(self.space.path(MERGED))
        self.cache = _cache(name, self.merged, Path(self.space.path(OFFSETS)))

    def retex(self, command: str, output: str, *options: str) -> Path:
        """Run a command of the workspace unless its output is there."""
        place = self.folder / output
        if not place.exists():
            line = [*measure.RETEX, command, "-w", str(self.folder), "-o", str(place), "--quiet", *options]
            subprocess.run(line, check=True)
        return place

    def train(self, task: str) -> list[tuple[Example, str]]:
        """Rows of the training split that no draw of fewer than all needs to repeat: input and label name."""
        sys.path.insert(0, str(ROOT / "examples/suites"))
        module = importlib.import_module("text" if self.space.model is None else "vision")
        rows = module.FAMILY.tasks[task].load().train[: DRAWS * LARGEST]
        kind: Callable[[object], Example] = (
            (lambda x: Example(text=str(x), source=task))
            if self.space.model is None
            else (lambda x: Example(tensors={"pixel_values": x}, source=task))
        )
        return [(kind(x), label) for x, label in rows]

    def test(self, task: str) -> list[Example]:
        """All labelled test rows."""
        return read_rows(Path(self.space.with_tests({})[task]))

    def expert(self, task: str) -> Checkpoint:
        """As it was fine-tuned."""
        return open_expert(self.space.with_experts({})[task], self.base)

    def encoder(self, checkpoint: Checkpoint) -> Encoder:
        """A checkpoint without a head, read for its layers."""
        limit = self.space.signatures.max_length
        return encoder_of(checkpoint, self.device, thread_count(None), model=self.space.model, max_length=limit)

    def features(self, which: str) -> dict[str, dict[str, Tensor]]:
        """Task -> "train" and "test" -> float32 [n, layers, width], of the "merged" checkpoint or the "base"."""
        found: dict[str, dict[str, Tensor]] = {}
        for task in self.tasks:
            place = self.cache / f"features-{which}-{task}.npz"
            if not place.is_file():
                encoder = self.encoder(self.merged if which == "merged" else self.base)
                parts = {"train": [example for example, _ in self.train(task)], "test": self.test(task)}
                arrays = {part: encoder.features(rows, 64, Silent()).numpy() for part, rows in parts.items()}
                save(place, arrays)
            with np.load(place) as file:
                found[task] = {part: torch.from_numpy(file[part]) for part in file.files}
        return found

    def answered(self, task: str) -> list[int]:
        """Which test rows ``answers`` is about."""
        count = len(self.test(task))
        return sorted(random.Random(0).sample(range(count), min(count, ANSWERED)))

    def answers(self) -> dict[str, dict[str, Names]]:
        """Task -> label names of the ``answered`` test rows: "truth", "expert", and for every OTHER task "E:OTHER" and
        "H:OTHER": the answers of OTHER's recovered encoder with the true head, and with OTHER's own."""
        found: dict[str, dict[str, Names]] = {task: {} for task in self.tasks}
        tests = {}
        for task in self.tasks:
            rows = self.test(task)
            tests[task] = [rows[i] for i in self.answered(task)]
        for other in self.tasks:
            place = self.cache / f"answers-{other}.npz"
            if not place.is_file():
                save(place, self._answers_of(other, tests))
            with np.load(place) as file:
                for key in file.files:
                    task, _, what = key.partition("/")
                    found[task][what] = file[key]
        for task, rows in tests.items():
            found[task]["truth"] = np.array([row.label for row in rows])
        return found

    def _answers_of(self, other: str, tests: Mapping[str, Sequence[Example]]) -> dict[str, Names]:
        network = self.network(other)
        expert = self.expert(other)
        network.load(expert.items(), other)
        heads = self.heads()
        arrays = {f"{other}/expert": heads[other](self.before_head(network, tests[other]))}
        network = self.recovered(other)
        for task, rows in tests.items():
            states = self.before_head(network, rows)
            arrays[f"{task}/E:{other}"] = heads[task](states)
            arrays[f"{task}/H:{other}"] = heads[other](states)
        return arrays

    def recovered(self, task: str) -> Network:
        """The network of a task with the weights that come back from the offsets."""
        network = self.network(task)
        with open_checkpoint(self.space.path(MERGED)) as merged:
            file = OffsetsFile(self.space.path(OFFSETS), merged)
            network.load(tensors_of(file, task, file.predictor([task])), task)
        return network

    def network(self, task: str) -> Network:
        """The network of a task's expert, its weights yet to come."""
        return Network(Path(self.space.with_experts({})[task]), self.device, model=self.space.model)

    def heads(self) -> dict[str, Head]:
        """Per task its expert's last layer."""
        found = {}
        for task in self.tasks:
            network, expert = self.network(task), self.expert(task)
            network.load(expert.items(), task)
            layer = last_layer(network)
            found[task] = Head(layer.weight.detach().clone(), layer.bias.detach().clone(), np.array(network.labels))
        return found

    def before_head(
        self, network: Network, rows: Sequence[Example], set_up: Callable[[Inputs, list[int]], None] | None = None
    ) -> Tensor:
        """What the last layer reads, float32 [n, width]; ``set_up`` hears of every batch and of its rows first."""
        states: dict[int, Tensor] = {}
        with seen(last_layer(network)) as heard:
            for batch in batches(rows, 64):
                inputs = network.inputs([rows[i] for i in batch])
                if set_up is not None:
                    set_up(inputs, batch)
                with network.inference():
                    network.module(**inputs)
                states.update(zip(batch, heard.pop().float(), strict=True))
        return torch.stack([states[i] for i in range(len(rows))])


def command_line(about: str | None) -> argparse.ArgumentParser:
    """What every benchmark of a suite can be told."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=("text8", "vision6"))
    parser.add_argument("--fresh", action="store_true", help="measure again what the cache has")
    return parser


def last_layer(network: Network) -> nn.Linear:
    """The linear layer that gives the logits."""
    layers = [layer for layer in network.module.modules() if isinstance(layer, nn.Linear)]
    assert layers[-1].out_features == len(network.labels)
    return layers[-1]


@contextmanager
def seen(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Inputs of a layer while it lasts."""
    heard: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, given: heard.append(given[0].detach().clone()))
    try:
        yield heard
    finally:
        hook.remove()


@dataclass(frozen=True)
class Head:
    """A last layer: what it answers to states [n, width]."""

    weight: Tensor
    bias: Tensor
    labels: Names

    def logits(self, states: Tensor) -> Tensor:
        """Float32 [n, classes]."""
        return states @ self.weight.T + self.bias

    def __call__(self, states: Tensor) -> Names:
        return self.labels[self.logits(states).argmax(1).numpy()]


def draw(rows: Tensor, count: int, number: int) -> Tensor:
    """``count`` of a task's training rows, or all if they are fewer: draws start ``LARGEST`` apart, and overlap only in
    tasks that have too few rows."""
    start = number * min(LARGEST, len(rows) // DRAWS)
    return rows[(torch.arange(min(count, len(rows))) + start) % len(rows)]


def milliseconds(work: Callable[[], object], inputs: int = 1, *, seconds: float = 0.4) -> float:
    """Of one core for each of ``inputs``: the least of five rounds of repeated calls, ``seconds`` in all."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    work()
    started = time.process_time()
    work()
    repeats = max(1, int(seconds / 5 / max(time.process_time() - started, 1e-6)))
    times = []
    for _ in range(5):
        started = time.process_time()
        for _ in range(repeats):
            work()
        times.append((time.process_time() - started) / repeats)
    torch.set_num_threads(before)
    return 1000 * min(times) / inputs


def save(place: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Arrays to a file of the cache that is there as a whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f"{place.stem}.partial-{os.getpid()}.npz")
    np.savez(partial, **arrays)
    partial.rename(place)
    print(f"  {place.name}", flush=True)


def _cache(name: str, merged: Checkpoint, offsets: Path) -> Path:
    """A folder that belongs to these weights and no others."""
    digest = hashlib.sha256(offsets.read_bytes())
    for file in merged.files:
        digest.update(file.read_bytes())
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retex" / "benchmarks"
    return home / f"identify-{name}-{digest.hexdigest()[:12]}"
