"""``retex build-signatures``: what tells the tasks apart, from a few unlabelled inputs of each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import retex_cli
from retex_cli.commands.identifier import FORMAT, VERSION, encoder_of, shapes_of
from retex_cli.commands.report import Json, Table
from retex_cli.errors import RetexError, UsageError
from retex_cli.io.artefact import check_artefact, write_artefact
from retex_cli.io.checkpoint import Checkpoint, open_checkpoint
from retex_cli.io.digests import sha256_file
from retex_cli.io.inputs import Example, read_rows
from retex_cli.io.provenance import checkpoint_fingerprint
from retex_cli.models.device import choose_device
from retex_cli.parallel import one_thread_each, thread_count
from retex_cli.progress import Progress
from retex_cli.signatures import PRESETS, Signatures, fit

LEAST, MOST = 32, 256


@dataclass(frozen=True)
class BuildSignaturesConfig:
    """``inputs``: task -> file of unlabelled inputs. ``samples``: how many of each are read, the first ones; None for
    all there are, up to 256. ``or_fewer``: a file that has fewer gives all it has, and a note says so.
    ``base`` is the encoder of the preset "sim". ``model``: see ``models.network.Network``."""

    merged: str
    inputs: Mapping[str, str]
    output: str
    preset: str = "default"
    base: str | None = None
    model: str | None = None
    samples: int | None = None
    or_fewer: bool = False
    max_length: int | None = None
    batch_size: int = 32
    device: str = "auto"
    threads: int | None = None
    seed: int = 0
    overwrite: bool = False


@dataclass(frozen=True)
class BuildSignaturesPlan:
    """Encoder opened by its headers, inputs read."""

    config: BuildSignaturesConfig
    encoder: Checkpoint
    inputs: Mapping[str, tuple[Example, ...]]

    def report(self) -> BuildSignaturesReport:
        counts = {task: {"inputs": len(examples)} for task, examples in self.inputs.items()}
        return BuildSignaturesReport(self.config.output, self.encoder.reference, {}, counts, None)


@dataclass(frozen=True)
class BuildSignaturesReport:
    """``{"output", "encoder", "recipe": {…}, "tasks": {name: {"inputs", "identified", "bytes"}}, "bytes"}``;
    ``identified`` is the share of a task's own reference inputs that are recognised when each is left out."""

    output: str
    encoder: str
    recipe: Mapping[str, object]
    rows: Mapping[str, Mapping[str, object]]
    written: int | None

    def to_json(self) -> Json:
        return {
            "output": self.output,
            "encoder": self.encoder,
            "recipe": self.recipe,
            "tasks": self.rows,
            "bytes": self.written,
        }

    def tables(self) -> list[Table]:
        if self.written is None:
            rows = tuple((task, str(row["inputs"])) for task, row in self.rows.items())
            return [Table("plan: reference inputs", ("task", "inputs"), rows)]
        rows4 = tuple(
            (task, str(row["inputs"]), f"{100 * float(str(row['identified'])):.1f} %", f"{row['bytes']:,}")
            for task, row in self.rows.items()
        )
        return [Table("signatures", ("task", "inputs", "recognised when left out", "bytes"), rows4)]

    def lines(self) -> list[str]:
        if self.written is None:
            return []
        recipe = ", ".join(f"{name} {value}" for name, value in self.recipe.items())
        return [f"features of {self.encoder}: {recipe}", f"wrote {self.output}: {self.written:,} bytes"]


def plan(config: BuildSignaturesConfig) -> BuildSignaturesPlan:
    """Read the inputs and check their number; open the encoder by its headers."""
    if config.preset not in PRESETS:
        raise UsageError(f"unknown preset {config.preset!r}", f"one of {', '.join(PRESETS)}")
    if config.preset == "sim" and not config.base:
        raise UsageError("the preset sim reads features of the pre-trained base", "give --base REF")
    check_samples(config.samples)
    if not config.inputs:
        raise UsageError("no inputs to build signatures from", "give --inputs NAME=FILE, or inputs in retex.toml")
    encoder = open_checkpoint(config.base if config.preset == "sim" and config.base else config.merged)
    inputs = {task: take(task, config.inputs[task], config) for task in sorted(config.inputs)}
    files = [*encoder.files, *map(Path, config.inputs.values())]
    check_artefact(config.output, overwrite=config.overwrite, inputs=files)
    return BuildSignaturesPlan(config, encoder, inputs)


def check_samples(samples: int | None) -> None:
    """UsageError for a number of inputs that signatures do not take."""
    if samples is not None and not LEAST <= samples <= MOST:
        raise UsageError(f"--samples {samples}: signatures take {LEAST} to {MOST} inputs a task")


class Wanted(Protocol):
    """How many inputs of a task are read; see ``BuildSignaturesConfig``."""

    @property
    def samples(self) -> int | None: ...

    @property
    def or_fewer(self) -> bool: ...


def take(task: str, path: str, wanted: Wanted) -> tuple[Example, ...]:
    """The first inputs of a file, as many as wanted, or up to ``MOST``.

    RetexError where there are fewer than wanted, unless fewer will do, and where there are not ``LEAST``.
    """
    rows = read_rows(Path(path))
    count = wanted.samples or MOST
    least = LEAST if wanted.or_fewer or wanted.samples is None else count
    if len(rows) < least:
        raise RetexError(
            f"{path}: {len(rows)} inputs for task {task!r}, at least {least} are needed",
            "give more unlabelled inputs" + ("" if least == LEAST else ", or a smaller --samples"),
        )
    return tuple(rows[:count])


def note_fewer(inputs: Mapping[str, Sequence[Example]], samples: int | None, progress: Progress) -> None:
    """Say which tasks have fewer inputs than ``samples``."""
    few = [f"{task} {len(rows)}" for task, rows in inputs.items() if samples is not None and len(rows) < samples]
    if few:
        progress.note(f"fewer than {samples} inputs, all of them are used: {', '.join(few)}")


def run(plan: BuildSignaturesPlan, progress: Progress) -> BuildSignaturesReport:
    """One forward pass an input, then a closed-form fit."""
    config = plan.config
    device = choose_device(config.device, progress)
    encoder = encoder_of(
        plan.encoder, device, thread_count(config.threads), model=config.model, max_length=config.max_length
    )
    note_fewer(plan.inputs, config.samples, progress)
    progress.start("reading features", sum(map(len, plan.inputs.values())))
    features = {task: encoder.features(examples, config.batch_size, progress) for task, examples in plan.inputs.items()}
    progress.start("fitting signatures", 1)
    with one_thread_each():
        signatures = fit(features, preset=config.preset)
    progress.advance()
    header = {
        "merged": config.preset != "sim",
        "reference": plan.encoder.reference,
        "revision": plan.encoder.revision,
        "fingerprint": checkpoint_fingerprint(plan.encoder),
        "max_length": encoder.max_length,
        "inputs": shapes_of([example for examples in plan.inputs.values() for example in examples]),
        "pooling": "mean over positions of every layer's output",
    }
    made = {
        "command": "build-signatures",
        "retex": retex_cli.__version__,
        "preset": config.preset,
        "encoder": {file.name: sha256_file(file) for file in plan.encoder.files},
        "inputs": {task: source_of(path) for task, path in sorted(config.inputs.items())},
    }
    return write_signatures(config.output, signatures, plan.encoder.reference, header, made, overwrite=config.overwrite)


def source_of(path: str) -> dict[str, object]:
    """What the recipe says of a file of reference inputs: its name and SHA-256, None for a folder."""
    return {"file": Path(path).name, "sha256": sha256_file(Path(path)) if Path(path).is_file() else None}


def write_signatures(
    output: str, signatures: Signatures, encoder: str, header: Mapping[str, object], made: Mapping[str, object], *,
    overwrite: bool,
) -> BuildSignaturesReport:  # fmt: skip
    """Write the file with its ``features`` header and ``recipe``; ``encoder`` is what the report calls the network."""
    tensors = signatures.to_tensors()
    metadata = {
        "features": json.dumps(header),
        "signatures": json.dumps(signatures.to_metadata(), sort_keys=True),
        "recipe": json.dumps(made, sort_keys=True),
    }
    size = write_artefact(output, tensors, metadata, format=FORMAT, version=VERSION, overwrite=overwrite)
    rows = {
        task: {"inputs": part.count, "identified": signatures.recognised[task], "bytes": part.nbytes}
        for task, part in signatures.stored.items()
    }
    return BuildSignaturesReport(output, encoder, signatures.describe(), rows, size)
