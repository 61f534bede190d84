"""``retex recover``: an expert, or a mix of experts, from merged checkpoint, offsets and signatures alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

import retex_cli
from retex_cli.allocator import give_back_large
from retex_cli.commands.expert_stream import Recovery, stream
from retex_cli.commands.offsets_file import OffsetsFile, Part
from retex_cli.commands.report import Json, Table
from retex_cli.errors import GateMissed, UsageError
from retex_cli.io.checkpoint import open_checkpoint
from retex_cli.io.dtypes import parse_dtype
from retex_cli.io.output import Output
from retex_cli.io.provenance import checkpoint_digests
from retex_cli.io.writer import TensorSpec, open_output
from retex_cli.models.device import choose_device
from retex_cli.offsets.predict import Predictor
from retex_cli.parallel import thread_count
from retex_cli.progress import Progress

if TYPE_CHECKING:
    from retex_cli.commands.identifier import Identification

AUTO = "auto"
NEGLIGIBLE = 1e-6
"""Shares of a soft mix below this are left out."""


@dataclass(frozen=True)
class RecoverConfig:
    """Exactly one of ``task``, ``input`` (or task "auto" with inputs) and ``mix`` says which expert is meant.

    ``mix``: task -> weight, summing to one. ``head``: whose task tensors a mix gets. ``soft``: with identified inputs,
    mix experts by how well they fit instead of taking the nearest. ``min_confidence``: a decision whose calibrated
    probability is lower, or that is "unknown", is refused. ``model`` (see ``models.network.Network``) builds the
    encoder that identifies; nothing else here runs a network.
    """

    merged: str
    offsets: str
    output: str
    signatures: str | None = None
    task: str | None = None
    input: tuple[str, ...] = ()
    mix: Mapping[str, float] | None = None
    soft: bool = False
    min_confidence: float | None = None
    head: str | None = None
    model: str | None = None
    dtype: str | None = None
    max_shard_size: int = 5_000_000_000
    device: str = "auto"
    threads: int | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class RecoverPlan:
    """What will be written. ``embedding`` and ``head`` are empty until inputs have been identified."""

    config: RecoverConfig
    file: OffsetsFile
    output: Output
    embedding: Mapping[str, float]
    head: str

    def report(self) -> RecoverReport:
        parts = self.parts() if self.head else []
        nbytes = sum(part.spec.nbytes for part in parts)
        return RecoverReport(self.config.output, self.embedding, self.head, None, len(parts), nbytes, written=False)

    def parts(self) -> list[Part]:
        parts = self.file.parts(self.head)
        if self.config.dtype is None:
            return parts
        dtype = parse_dtype(self.config.dtype)
        return [
            replace(part, spec=TensorSpec(part.spec.name, dtype, part.spec.shape))
            if part.spec.dtype.is_floating_point
            else part
            for part in parts
        ]


@dataclass(frozen=True)
class RecoverReport:
    """``{"output", "embedding": {task: weight}, "head", "identified": {…} | null, "tensors", "bytes"}``."""

    output: str
    embedding: Mapping[str, float]
    head: str
    identified: Identification | None
    tensors: int
    nbytes: int
    written: bool = True

    def to_json(self) -> Json:
        identified = self.identified.to_json() if self.identified else None
        return {
            "output": self.output,
            "embedding": dict(self.embedding),
            "head": self.head,
            "identified": identified,
            "tensors": self.tensors,
            "bytes": self.nbytes,
        }

    def tables(self) -> list[Table]:
        return []

    def lines(self) -> list[str]:
        lines = [self.identified.sentence()] if self.identified else []
        if not self.head:
            return [*lines, f"plan: the expert of the task that is identified, to {self.output}"]
        if not self.written:
            return [*lines, f"plan: {self.tensors} tensors, {self.nbytes:,} bytes to {self.output}"]
        what = " + ".join(f"{weight:g} {task}" if weight != 1 else task for task, weight in self.embedding.items())
        head = f" with the head of {self.head}" if len(self.embedding) > 1 else ""
        return [*lines, f"recovered {what}{head}: {self.tensors} tensors, {self.nbytes:,} bytes in {self.output}"]


def plan(config: RecoverConfig) -> RecoverPlan:
    """Open the artefacts, check the request against them and the output against the disk."""
    _check_request(config)
    merged = open_checkpoint(config.merged)
    file = OffsetsFile(config.offsets, merged)
    embedding: dict[str, float] = {}
    head = ""
    if config.mix:
        embedding = dict(sorted(config.mix.items()))
        head = head_of(embedding, config.head)
    elif config.task and config.task != AUTO:
        embedding, head = {config.task: 1.0}, config.head or config.task
    for task in (*embedding, *([config.head] if config.head else [])):
        file.task(task)
    output = Output.parse(config.output)
    planned = RecoverPlan(config, file, output, embedding, head)
    inputs = [*merged.files, Path(config.offsets), *([Path(config.signatures)] if config.signatures else [])]
    output.check(config.overwrite, inputs, planned.report().nbytes or merged.nbytes)
    return planned


def _check_request(config: RecoverConfig) -> None:
    auto = config.task == AUTO or (config.task is None and bool(config.input))
    ways = [config.task is not None and config.task != AUTO, bool(config.mix), auto]
    if sum(ways) != 1:
        raise UsageError(
            "say which expert is meant in exactly one way", "give --task NAME, --input FILE or --mix NAME=SHARE,..."
        )
    if auto and not config.input:
        raise UsageError("--task auto needs inputs to identify", "give --input FILE")
    if auto and not config.signatures:
        raise UsageError("identifying inputs needs a signature file", "give --signatures FILE")
    if config.input and not auto:
        raise UsageError("--input is for identifying the task, and it is already given", "leave one of them out")
    if config.soft and not auto:
        raise UsageError("--soft mixes identified experts", "give --input FILE with it")
    if config.min_confidence is not None and not auto:
        raise UsageError("--min-confidence is about identified inputs", "give --input FILE with it")
    if config.min_confidence is not None and not 0 <= config.min_confidence <= 1:
        raise UsageError(f"--min-confidence {config.min_confidence:g} is no probability", "for example 0.95")
    if config.mix:
        check_shares(config.mix)


class Unsure(GateMissed):
    """The inputs were identified, and less surely than the caller wants; ``report`` says as what."""

    def __init__(self, message: str, report: RecoverReport) -> None:
        super().__init__(message, "give more inputs of the task, or name it: --task NAME")
        self.report = report


def check_shares(mix: Mapping[str, float]) -> None:
    """UsageError unless the shares of a mix sum to one and none is negative."""
    total = math.fsum(mix.values())
    if not math.isclose(total, 1, abs_tol=1e-6) or any(weight < 0 for weight in mix.values()):
        raise UsageError(f"the shares of the mix sum to {total:g}, not 1, or one is negative", "e.g. cars=0.7,dtd=0.3")


def head_of(embedding: Mapping[str, float], head: str | None) -> str:
    """The task whose task tensors a mix gets: the named one, or the one with the largest share."""
    return head or max(embedding, key=lambda task: (embedding[task], task))


def run(plan: RecoverPlan, progress: Progress) -> RecoverReport:
    """Identify if asked to, then stream the expert tensor by tensor; an output of the wrong merged file never lands."""
    identified = None
    if not plan.head:
        identified, plan = _identify(plan, progress)
    config, file = plan.config, plan.file
    device = choose_device(config.device, progress)
    if not file.is_exact(plan.embedding, plan.head):
        left_out = [task for task in plan.embedding if file.task(task).correction_bytes]
        if left_out:
            names = ", ".join(left_out)
            progress.note(f"the exact correction of {names} is not used: it is for one task alone, with its own head")
    give_back_large(16 << 20)  # blocks are used again: fresh memory costs as much as what is done in it
    recovery = Recovery(file, file.predictor(plan.embedding), plan.embedding, plan.head, device)
    parts = plan.parts()
    threads = thread_count(config.threads)
    if plan.output.kind == "stdout":  # what has gone down a pipe cannot be taken back: check first
        file.check_merged(checkpoint_digests(file.merged, threads))
    with open_output(
        plan.output,
        [part.spec for part in parts],
        metadata=_metadata(plan),
        overwrite=config.overwrite,
        max_shard_size=config.max_shard_size,
        side_files=file.side_files(plan.head) if plan.output.kind == "folder" else {},
    ) as writer:
        stream(recovery, parts, writer, threads, progress)
    return RecoverReport(
        config.output, plan.embedding, plan.head, identified, len(parts), sum(part.spec.nbytes for part in parts)
    )


def _identify(plan: RecoverPlan, progress: Progress) -> tuple[Identification, RecoverPlan]:
    config = plan.config
    if config.signatures is None:
        raise UsageError("identifying inputs needs a signature file", "give --signatures FILE")
    from retex_cli.commands.identifier import Identifier, read_inputs
    from retex_cli.io.inputs import BadInput

    identifier = Identifier.open(config.signatures, config.merged, config.device, progress, model=config.model)
    items = list(read_inputs(config.input))
    progress.start("identifying", len(items))
    identified = identifier.identify_batch(items, progress)[0]
    if isinstance(identified, BadInput):  # one expert is written for all of them: none may be left out
        raise identified.error
    _check_confidence(plan, identified)
    soft = config.soft or identified.unknown  # never a silent wrong expert
    if soft and not config.soft:
        progress.note(f"{identified.sentence()}: mixing experts by how well they fit")
    shares = {task: share for task, share in identified.embedding.items() if share > NEGLIGIBLE}
    embedding = {task: share / math.fsum(shares.values()) for task, share in shares.items()}
    embedding = embedding if soft else {identified.task: 1.0}
    plan.file.check_covers(embedding, config.signatures)
    return identified, replace(plan, embedding=embedding, head=config.head or identified.task)


def _check_confidence(plan: RecoverPlan, identified: Identification) -> None:
    wanted = plan.config.min_confidence
    if wanted is None or (identified.probability >= wanted and not identified.unknown):
        return
    report = RecoverReport(plan.config.output, {}, identified.task, identified, 0, 0, written=False)
    raise Unsure(f"{identified.sentence()}, wanted {100 * wanted:g} %: nothing is written", report)


def _metadata(plan: RecoverPlan) -> dict[str, str]:
    recipe = {
        "command": "recover",
        "retex": retex_cli.__version__,
        "embedding": dict(plan.embedding),
        "head": plan.head,
        "merged": {"reference": plan.config.merged, "fingerprint": plan.file.fingerprint},
        "experts": {task: plan.file.task(task).fingerprint for task in plan.embedding},
    }
    return {"retex_version": retex_cli.__version__, "recipe": json.dumps(recipe, sort_keys=True)}


def tensors_of(
    file: OffsetsFile, task: str, predictor: Predictor, encoder: str | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the expert of ``task``; with ``encoder`` its shared tensors are another task's, "" for the
    merged checkpoint's own."""
    chosen = task if encoder is None else encoder
    embedding = {chosen: 1.0} if chosen else {}
    for part in file.parts(task):
        yield part.spec.name, file.make(part, predictor, embedding, task)
