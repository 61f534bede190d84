"""``retex build-signatures --add TASK=FILE --remove TASK``: tasks join a signature file, and leave it.

Nothing but the file, the network it was built on and a newcomer's own inputs is read. What the other tasks have in the
file stays as it is, and so do the choices of the recipe: layers and their weights, score, shrinkage and temperature.
Under those choices every score is what a joint build would give; building again may choose otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from retex_cli.commands.build_signatures import (
    BuildSignaturesReport,
    check_samples,
    note_fewer,
    source_of,
    take,
    write_signatures,
)
from retex_cli.commands.identifier import Identifier, SignaturesFile
from retex_cli.errors import RetexError, UsageError
from retex_cli.io.artefact import check_artefact
from retex_cli.io.checkpoint import Checkpoint
from retex_cli.io.inputs import Example
from retex_cli.models.device import choose_device
from retex_cli.parallel import one_thread_each, thread_count
from retex_cli.progress import Progress
from retex_cli.signatures import Signatures


@dataclass(frozen=True)
class ChangeSignaturesConfig:
    """``signatures`` is changed in place. ``add``: task -> file of unlabelled inputs; ``remove``: tasks that leave,
    before others join. The rest as in ``BuildSignaturesConfig``."""

    merged: str
    signatures: str
    add: Mapping[str, str]
    remove: tuple[str, ...] = ()
    model: str | None = None
    samples: int | None = None
    or_fewer: bool = False
    batch_size: int = 32
    device: str = "auto"
    threads: int | None = None


@dataclass(frozen=True)
class ChangeSignaturesPlan:
    """The file without the tasks that leave, the inputs of those that join, and the network that reads them."""

    config: ChangeSignaturesConfig
    file: SignaturesFile
    left: Signatures
    inputs: Mapping[str, tuple[Example, ...]]
    encoder: Checkpoint | None

    def report(self) -> BuildSignaturesReport:
        counts = {task: part.count for task, part in self.left.stored.items()}
        counts |= {task: len(rows) for task, rows in self.inputs.items()}
        rows = {task: {"inputs": counts[task]} for task in sorted(counts)}
        return BuildSignaturesReport(self.config.signatures, _encoder_name(self), {}, rows, None)


def plan(config: ChangeSignaturesConfig) -> ChangeSignaturesPlan:
    """Open the file and, where a task joins, its network by the headers; read the newcomers' inputs.

    RetexError for a task that is not there to leave or is there already, and where no task would be left.
    """
    if not config.add and not config.remove:
        raise UsageError("nothing to change", "--add TASK=FILE or --remove TASK")
    check_samples(config.samples)
    file = SignaturesFile.open(config.signatures)
    left = file.signatures
    for task in config.remove:
        left = left.remove(task)
    for task in config.add:
        if task in left.tasks:
            raise RetexError(
                f"{config.signatures}: there is a signature of task {task!r} already",
                f"--remove {task} --add {task}={config.add[task]} replaces it",
            )
    inputs = {task: take(task, config.add[task], config) for task in sorted(config.add)}
    encoder = file.encoder(config.merged) if inputs else None
    files = [*(encoder.files if encoder else ()), *map(Path, config.add.values())]
    check_artefact(config.signatures, overwrite=True, inputs=files)
    return ChangeSignaturesPlan(config, file, left, inputs, encoder)


def run(plan: ChangeSignaturesPlan, progress: Progress) -> BuildSignaturesReport:
    """One forward pass for each of the newcomers' inputs."""
    config, signatures = plan.config, plan.left
    if plan.encoder is not None:
        identifier = Identifier.of(
            plan.file,
            plan.encoder,
            choose_device(config.device, progress),
            model=config.model,
            threads=thread_count(config.threads),
            batch_size=config.batch_size,
        )
        note_fewer(plan.inputs, config.samples, progress)
        progress.start("reading features", sum(map(len, plan.inputs.values())))
        for task, examples in plan.inputs.items():
            features = identifier.features(examples, progress)
            with one_thread_each():
                signatures = signatures.add(task, features)
    header, made = (json.loads(plan.file.metadata[key]) for key in ("features", "recipe"))
    kept = {task: source for task, source in made["inputs"].items() if task in plan.left.tasks}
    made["inputs"] = dict(sorted({**kept, **{task: source_of(path) for task, path in config.add.items()}}.items()))
    return write_signatures(config.signatures, signatures, _encoder_name(plan), header, made, overwrite=True)


def _encoder_name(plan: ChangeSignaturesPlan) -> str:
    return plan.encoder.reference if plan.encoder is not None else plan.file.reference or plan.config.merged
