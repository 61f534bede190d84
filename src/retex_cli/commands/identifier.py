"""Naming the task of an input: the signature file, the encoder whose features it was built on, and both together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from retex_cli.errors import RetexError
from retex_cli.io.artefact import open_artefact
from retex_cli.io.checkpoint import Checkpoint, open_checkpoint
from retex_cli.io.inputs import Example, read_rows
from retex_cli.io.provenance import checkpoint_fingerprint
from retex_cli.models.device import choose_device
from retex_cli.models.encoder import Encoder
from retex_cli.models.network import Network
from retex_cli.parallel import thread_count
from retex_cli.progress import Progress
from retex_cli.signatures import Decisions, Signatures

FORMAT = "retex.signatures"
VERSION = 1


@dataclass(frozen=True)
class Identification:
    """What was decided for one input, or for several that share a task.

    ``probability`` is calibrated on held-out reference inputs; ``margin`` is the distance to the second best task in
    units of the score; ``embedding`` weighs all tasks by how well they fit and sums to one.
    """

    source: str
    task: str
    probability: float
    margin: float
    unknown: bool
    embedding: Mapping[str, float]

    def to_json(self) -> dict[str, object]:
        return {
            "source": self.source,
            "task": self.task,
            "probability": self.probability,
            "margin": self.margin,
            "unknown": self.unknown,
            "embedding": dict(self.embedding),
        }

    def sentence(self) -> str:
        """For a person."""
        doubt = ", but unlike any reference input" if self.unknown else ""
        return f"{self.source}: {self.task} ({100 * self.probability:.1f} % sure{doubt})"


def identifications(sources: Sequence[str], decisions: Decisions, tasks: Sequence[str]) -> list[Identification]:
    """One value per input of what the signatures decided."""
    return [
        Identification(
            source=source,
            task=tasks[int(decisions.task[i])],
            probability=float(decisions.probability[i]),
            margin=float(decisions.margin[i]),
            unknown=bool(decisions.unknown[i]),
            embedding={task: float(weight) for task, weight in zip(tasks, decisions.embedding[i], strict=True)},
        )
        for i, source in enumerate(sources)
    ]


def encoder_of(
    checkpoint: Checkpoint, device: torch.device, threads: int, *, model: str | None, max_length: int | None
) -> Encoder:
    """The checkpoint as a network whose layers can be read. RetexError for a bare weight file."""
    network = Network.of(checkpoint.side_files(), checkpoint.reference, device, model=model, max_length=max_length)
    network.load({name: checkpoint.read(name) for name in checkpoint.tensors}, checkpoint.reference)
    return Encoder(network, threads)


class Identifier:
    """Signatures with their encoder, ready to be asked."""

    def __init__(self, signatures: Signatures, encoder: Encoder, batch_size: int) -> None:
        self.signatures = signatures
        self.tasks = signatures.tasks
        self._encoder = encoder
        self._batch_size = batch_size

    @classmethod
    def open(
        cls,
        path: str,
        merged: str,
        device: str,
        progress: Progress,
        *,
        model: str | None = None,
        threads: int | None = None,
        batch_size: int = 64,
    ) -> Self:
        """Open a signature file and the encoder it names; ``model`` builds it as in ``Network``.

        RetexError when that is not the encoder the file was built on.
        """
        file = open_artefact(path, format=FORMAT, versions={VERSION})
        try:
            header = json.loads(file.metadata["features"])
            own, fingerprint, max_length = header["merged"], header["fingerprint"], header["max_length"]
            reference = merged if own else header["reference"]
            recipe = json.loads(file.metadata["signatures"])
        except (KeyError, TypeError, ValueError) as error:
            raise RetexError(f"{path}: damaged header: {error}", "build the signatures again") from error
        checkpoint = open_checkpoint(reference)
        found = checkpoint_fingerprint(checkpoint)
        if found != fingerprint:
            raise RetexError(
                f"{path}: built on another encoder: fingerprint {fingerprint[:16]}…, {reference} has {found[:16]}…",
                "give the checkpoint that the signatures were built on, or build them again",
            )
        signatures = Signatures.from_tensors({name: file.read(name) for name in file.tensors}, recipe)
        encoder = encoder_of(
            checkpoint, choose_device(device, progress), thread_count(threads), model=model, max_length=max_length
        )
        return cls(signatures, encoder, batch_size)

    def decide(self, examples: Sequence[Example], progress: Progress) -> Decisions:
        """What the signatures say of every example by itself; one step of progress an example."""
        return self.signatures.identify(self._encoder.features(examples, self._batch_size, progress))

    def identify(self, inputs: Sequence[str], progress: Progress) -> list[Identification]:
        """Every input of these files, or given as text, by itself."""
        examples = read_inputs(inputs)
        progress.start("identifying", len(examples))
        decisions = self.decide(examples, progress)
        return identifications([example.source for example in examples], decisions, self.tasks)

    def identify_batch(self, inputs: Sequence[str], progress: Progress) -> Identification:
        """All inputs together, which share a task."""
        examples = read_inputs(inputs)
        progress.start("identifying", len(examples))
        features = self._encoder.features(examples, self._batch_size, progress)
        source = examples[0].source if len(examples) == 1 else f"{len(examples)} inputs"
        return identifications([source], self.signatures.identify_batch(features), self.tasks)[0]


def read_inputs(inputs: Sequence[str]) -> list[Example]:
    """Inputs as a person types them: files and folders of any kind that tasks may have, or a text with a blank in it.

    One word is taken for a path, so that a mistyped file name is an error and not a text.
    """
    examples: list[Example] = []
    for given in inputs:
        if not Path(given).exists() and any(character.isspace() for character in given):
            examples.append(Example(text=given, source=repr(given if len(given) <= 40 else given[:37] + "...")))
        else:
            examples += read_rows(given)
    return examples
