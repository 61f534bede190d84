"""``retex identify``: which task is each of these inputs?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from retex_cli.commands.identifier import Answer, Identification, Identifier, SignaturesFile, read_inputs
from retex_cli.commands.report import Json, Table
from retex_cli.errors import UsageError
from retex_cli.io.checkpoint import Checkpoint
from retex_cli.io.inputs import BadInput, Item
from retex_cli.models.device import choose_device
from retex_cli.parallel import thread_count
from retex_cli.progress import Progress

STDIN = "-"
FIRST, LARGEST = 64, 4096
"""Inputs that are looked at together, so that batches are of like length: few at first, answers shall come soon."""


@dataclass(frozen=True)
class IdentifyConfig:
    """``inputs``: see ``identifier.read_inputs``. ``batch``: they share a task. ``model``: see
    ``models.network.Network``."""

    merged: str
    signatures: str
    inputs: tuple[str, ...]
    batch: bool = False
    model: str | None = None
    batch_size: int = 64
    device: str = "auto"
    threads: int | None = None


@dataclass(frozen=True)
class IdentifyPlan:
    """Signatures opened, and the encoder that they were built on, by its headers. No input is read yet."""

    config: IdentifyConfig
    file: SignaturesFile
    encoder: Checkpoint

    def report(self) -> IdentifyPlanReport:
        return IdentifyPlanReport(self.config.inputs, self.encoder.reference, self.file.signatures.tasks)


@dataclass(frozen=True)
class IdentifyPlanReport:
    """``{"inputs": […], "encoder", "tasks": […]}``."""

    inputs: tuple[str, ...]
    encoder: str
    tasks: tuple[str, ...]

    def to_json(self) -> Json:
        return {"inputs": list(self.inputs), "encoder": self.encoder, "tasks": list(self.tasks)}

    def tables(self) -> list[Table]:
        return []

    def lines(self) -> list[str]:
        return [f"plan: the task of {', '.join(self.inputs)} by {self.encoder}, out of {', '.join(self.tasks)}"]


@dataclass(frozen=True)
class IdentifyReport:
    """``{"inputs": [{"source", "task", "probability", "margin", "unknown", "embedding"}], "bad": [{"source", "error",
    "hint"}]}``."""

    inputs: tuple[Identification, ...]
    bad: tuple[BadInput, ...]

    def to_json(self) -> Json:
        return {"inputs": [found.to_json() for found in self.inputs], "bad": [item.to_json() for item in self.bad]}

    def tables(self) -> list[Table]:
        return []

    def lines(self) -> list[str]:
        return [found.line() for found in self.inputs] + [item.line() for item in self.bad]


def plan(config: IdentifyConfig) -> IdentifyPlan:
    """UsageError where there is nothing to identify, or standard input is to be read twice.

    RetexError for signatures of another encoder.
    """
    if not config.inputs:
        raise UsageError("nothing to identify", "give files of inputs: retex identify inputs.jsonl")
    if config.inputs.count(STDIN) > 1:
        raise UsageError("standard input can be read once", "give - once")
    file = SignaturesFile.open(config.signatures)
    return IdentifyPlan(config, file, file.encoder(config.merged))


def stream(plan: IdentifyPlan, progress: Progress) -> Iterator[list[Answer]]:
    """One forward pass of the encoder an input; answers in the order of the inputs, some at a time."""
    config = plan.config
    device = choose_device(config.device, progress)
    threads, batch_size = thread_count(config.threads), config.batch_size
    identifier = Identifier.of(
        plan.file, plan.encoder, device, model=config.model, threads=threads, batch_size=batch_size
    )
    items: Iterable[Item] = read_inputs(config.inputs)
    if config.batch or STDIN not in config.inputs:
        items = list(items)
        progress.start("identifying", len(items))
    if config.batch:
        yield identifier.identify_batch(list(items), progress)
        return
    for window in windows(items):
        yield identifier.identify(window, progress)


def windows(items: Iterable[Item]) -> Iterator[list[Item]]:
    """A few, then more and more, so that memory stays bounded however many there are."""
    waiting, size = iter(items), FIRST
    while window := list(islice(waiting, size)):
        yield window
        size = min(4 * size, LARGEST)


def run(plan: IdentifyPlan, progress: Progress) -> IdentifyReport:
    """Everything that ``stream`` gives."""
    answers = [answer for some in stream(plan, progress) for answer in some]
    return IdentifyReport(
        tuple(answer for answer in answers if isinstance(answer, Identification)),
        tuple(answer for answer in answers if isinstance(answer, BadInput)),
    )
