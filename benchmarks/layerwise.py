"""ESM++ as it runs: the ESM merge with residual adapters, each layer choosing the task by itself (``identifiers``)."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from identifiers.form import unit
from identifiers.prototypes import Adapter, Routing, adapter, input_mean, routed, watched
from record import provenance
from suite_runs import DRAWS, LARGEST, Suite, milliseconds
from torch import Tensor

from retex_cli.io.checkpoint import open_checkpoint
from retex_cli.io.inputs import Example
from retex_cli.models.network import Network
from retex_cli.models.processor import Inputs
from retex_cli.models.statistics import input_grams
from retex_cli.parallel import thread_count
from retex_cli.progress import Silent

RANKS = {2: 1, 8: DRAWS, 32: 1}
"""Rank of the adapters, and how many draws are run: the rank says little about who is found."""

TESTS, CALIBRATION = 100, 32
"""Test rows of a task that are run, and inputs of a task that adapters are made from (as in the paper)."""

NOTE = (
    f"its own forward pass, on {TESTS} random test rows a task; task by the vote of its layers; E and H are shares of "
    "the same pass with the task known; bytes are the prototypes'"
)

_ADAPTED = re.compile(r"(attention\.self\.(query|key|value)|intermediate\.dense|_expand_conv)\.weight$")
_READS = re.compile(
    r"encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)\.weight$|_blocks\.(\d+)\._expand_conv\.weight$"
)


def reads(name: str) -> int | None:
    """Which layer of the features a weight reads as it is: the hidden state before a block, or the block before."""
    found = _READS.search(name)
    if found is None:
        return None
    return int(found[1]) if found[1] is not None else int(found[3]) - 1


def prefix(names: Iterable[str]) -> str:
    """What an expert's names have before the base's."""
    return "bert." if any(name.startswith("bert.") for name in names) else ""


def measured(run: Run, count: int, rank: int) -> dict[str, object]:
    """Task found by vote, E and H as shares of the oracle's answers, all on the same rows."""
    suite = run.suite
    run.prepare(count, rank)
    entry: dict[str, dict[str, float]] = {key: {} for key in ("accuracy", "layers", "E", "H", "E_expert", "H_expert")}
    for t, task in enumerate(suite.tasks):
        found = run.on(sample(suite, task), t)
        entry["accuracy"][task] = float((found.votes.argmax(1) == t).float().mean())
        entry["layers"][task] = float(found.votes[:, t].mean())
        for protocol, right in (("E", found.e), ("H", found.h)):
            entry[protocol][task] = right / found.oracle
            entry[f"{protocol}_expert"][task] = right / found.expert
    bytes_ = sum(a.prototypes.nbytes for a in run.adapters.values()) / len(suite.tasks)
    stored = sum(a.down.nbytes + a.up.nbytes for a in run.adapters.values()) / 2 / len(suite.tasks)  # in float16
    return {**entry, "bytes": bytes_, "adapter_bytes": stored, "commit": provenance()["commit"]}


@dataclass(frozen=True)
class _Found:
    """``votes`` [n, tasks], and the shares of right answers."""

    votes: Tensor
    e: float
    h: float
    oracle: float
    expert: float


@dataclass
class _Means:
    """Unit-length input means [n, d_in] of every layer, batch by batch."""

    parts: dict[str, list[Tensor]]
    mask: Tensor | None = None

    def set_up(self, inputs: Inputs, batch: list[int]) -> None:
        self.mask = inputs.get("attention_mask")

    def see(self, name: str, x: Tensor) -> None:
        self.parts[name].append(unit(input_mean(x, self.mask)))


class Run:
    """One draw: the merged network, and its adapters once ``prepare`` has made them.

    ``merged``: another merge than ESM's, where only its shapes matter.
    """

    def __init__(self, suite: Suite, number: int, merged: str | None = None) -> None:
        self.suite, self.number = suite, number
        self.heads = suite.heads()
        with open_checkpoint(merged or str(suite.retex("merge", "esm", "--method", "esm"))) as file:
            self.merged = {name: file.read(name) for name in file.tensors}
        self.network = self._merged_network()
        modules = dict(self.network.module.named_modules())
        self.names = [name for name in modules if _ADAPTED.search(f"{name}.weight")]
        self.adapters: dict[str, Adapter] = {}
        self._full: dict[int, dict[str, Adapter]] = {}

    @cached_property
    def _experts(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
        return self._of_experts(self.number)

    def prepare(self, count: int, rank: int) -> None:
        """Adapters of ``rank``, prototypes of ``count`` inputs a task; larger ranks begin with the smaller ones."""
        if count not in self._full:
            (grams, residuals), means = self._experts, self._prototypes(count, self.number)
            of = {name: [part[name] for part in (residuals[t] for t in self.suite.tasks)] for name in self.names}
            self._full[count] = {
                name: adapter(
                    of[name],
                    [grams[task][name] for task in self.suite.tasks],
                    [means[task][name] for task in self.suite.tasks],
                    max(RANKS),
                )
                for name in self.names
            }
        self.adapters = {
            name: Adapter(full.prototypes, full.down[:, :rank], full.up[:, :, :rank])
            for name, full in self._full[count].items()
        }

    def made_up(self, rank: int) -> None:
        """Adapters of the right shapes and no meaning, to be timed."""
        modules, tasks = dict(self.network.module.named_modules()), len(self.suite.tasks)
        for name in self.names:
            weight = modules[name].weight
            assert isinstance(weight, Tensor)
            out, width = weight.flatten(1).shape
            rank_ = min(rank, out, width)
            prototypes = unit(torch.randn(tasks, width))
            self.adapters[name] = Adapter(prototypes, torch.zeros(tasks, rank_, width), torch.zeros(tasks, out, rank_))

    @cached_property
    def of_experts(self) -> dict[str, float]:
        """Share of right answers that every expert itself gives on its sampled rows."""
        found = {}
        for task in self.suite.tasks:
            network, expert = self.suite.network(task), self.suite.expert(task)
            network.load(expert.items(), task)
            rows = sample(self.suite, task)
            found[task] = share(self.heads[task](self.suite.before_head(network, rows)), rows)
        return found

    def _merged_network(self) -> Network:
        task = self.suite.tasks[0]
        expert = self.suite.expert(task)
        start = prefix(expert.tensors)
        network = self.suite.network(task)
        tensors = {name: self.merged.get(name.removeprefix(start)) for name in expert.tensors}
        network.load(((name, expert.read(name) if t is None else t) for name, t in tensors.items()), "esm")
        return network

    def _rows(self, task: str, count: int, number: int) -> list[Example]:
        rows = [example for example, _ in self.suite.train(task)]
        start = number * min(LARGEST, len(rows) // DRAWS)
        return [rows[(start + i) % len(rows)] for i in range(min(count, len(rows)))]

    def _of_experts(self, number: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
        grams, residuals = {}, {}
        for task in self.suite.tasks:
            network, expert = self.suite.network(task), self.suite.expert(task)
            network.load(expert.items(), task)
            weights = [f"{name}.weight" for name in self.names]
            rows = self._rows(task, CALIBRATION, number)
            found = dict(input_grams(network, rows, weights, 32, thread_count(None), Silent()))
            grams[task] = {name.removesuffix(".weight"): gram for name, gram in found.items()}
            start = prefix(expert.tensors)
            residuals[task] = {}
            for name, weight in zip(self.names, weights, strict=True):
                difference = expert.read(weight) - self.merged[weight.removeprefix(start)]
                residuals[task][name] = difference.float().flatten(1)
        return grams, residuals

    def _prototypes(self, count: int, number: int) -> dict[str, dict[str, Tensor]]:
        means: dict[str, dict[str, Tensor]] = {}
        for task in self.suite.tasks:
            seen = _Means({name: [] for name in self.names})
            with watched(self.network.module, self.names, seen.see):
                self.suite.before_head(self.network, self._rows(task, count, number), seen.set_up)
            means[task] = {name: torch.cat(parts).mean(0) for name, parts in seen.parts.items()}
        return means

    def states(self, rows: list[Example], task: int, *, oracle: bool) -> tuple[Tensor, Tensor]:
        """What the head reads, and the share of layers that chose each task: [n, width], [n, tasks]."""
        votes: dict[int, Tensor] = {}
        pending: list[tuple[Routing, list[int]]] = []

        def collect() -> None:
            for routing, batch in pending:
                votes.update(zip(batch, routing.votes(len(self.suite.tasks)), strict=True))
            pending.clear()

        def set_up(routing: Routing, inputs: Inputs, batch: list[int]) -> None:
            collect()
            routing.mask = inputs.get("attention_mask")
            routing.oracle = torch.full((len(batch),), task) if oracle else None
            pending.append((routing, batch))

        with routed(self.network.module, self.adapters) as routing:
            found = self.suite.before_head(self.network, rows, partial(set_up, routing))
            collect()
        return found, torch.stack([votes[i] for i in range(len(rows))])

    def on(self, rows: list[Example], task: int) -> _Found:
        """Shares of right answers on one task's ``rows``."""
        name = self.suite.tasks[task]
        known, _ = self.states(rows, task, oracle=True)
        found, votes = self.states(rows, task, oracle=False)
        by_head = {head: answer(found) for head, answer in self.heads.items()}
        chosen = [self.suite.tasks[int(t)] for t in votes.argmax(1)]
        given = [by_head[head][i] for i, head in enumerate(chosen)]
        oracle = share(self.heads[name](known), rows)
        return _Found(votes, share(by_head[name], rows), share(given, rows), oracle, self.of_experts[name])

    def extra_ms(self, count: int) -> float:
        """What routing and adapters cost a forward pass of ``count`` inputs, in milliseconds of one core an input."""
        rows = self.suite.test(self.suite.tasks[0])[:count]
        times = []
        for adapters in ({}, self.adapters):
            with routed(self.network.module, adapters):
                times.append(milliseconds(lambda: self.suite.before_head(self.network, rows), count, seconds=0.6))
        return times[1] - times[0]


def share(given: Sequence[str], rows: Sequence[Example]) -> float:
    """Of ``given`` answers those that are right."""
    return sum(a == row.label for a, row in zip(given, rows, strict=True)) / len(rows)


def sample(suite: Suite, task: str) -> list[Example]:
    """The test rows that are run."""
    rows = suite.test(task)
    return rows if len(rows) <= TESTS else random.Random(0).sample(rows, TESTS)
