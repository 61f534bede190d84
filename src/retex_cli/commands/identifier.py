"""Naming the task of an input: the signature file, the encoder whose features it was built on, and both together."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor

from retex_cli.errors import RetexError
from retex_cli.io.artefact import open_artefact
from retex_cli.io.checkpoint import Checkpoint, open_checkpoint
from retex_cli.io.inputs import BadInput, Example, Item, read_items, read_stream
from retex_cli.io.provenance import checkpoint_fingerprint
from retex_cli.models.device import choose_device
from retex_cli.models.encoder import Encoder
from retex_cli.models.network import Network
from retex_cli.models.passes import Passed
from retex_cli.parallel import thread_count
from retex_cli.progress import Progress
from retex_cli.signatures import Decisions, Signatures

FORMAT = "retex.signatures"
VERSION = 2


@dataclass(frozen=True)
class Identification:
    """What was decided for one input, or for several that share a task.

    ``probability`` is calibrated on held-out reference inputs; ``margin`` is the distance to the second best task in
    units of the score; ``embedding`` weighs all tasks by how well they fit and sums to one. ``shares``: which
    experts are asked, and how much the answer of each counts; see ``signatures.Decisions``.
    """

    source: str
    task: str
    probability: float
    margin: float
    unknown: bool
    embedding: Mapping[str, float]
    shares: Mapping[str, float]
    bad: ClassVar[bool] = False

    def to_json(self) -> dict[str, object]:
        return {
            "source": self.source,
            "task": self.task,
            "probability": self.probability,
            "margin": self.margin,
            "unknown": self.unknown,
            "embedding": dict(self.embedding),
        }

    def experts(self, *, blend: bool) -> dict[str, float]:
        """``shares``, or without ``blend`` the nearest task alone."""
        return dict(self.shares) if blend else {self.task: 1.0}

    def line(self) -> str:
        """Task or "unknown", probability, margin and source between tabs; behind them the nearest task if unknown."""
        words = ["unknown" if self.unknown else self.task, f"{100 * self.probability:.1f} %", f"{self.margin:.3g}"]
        return "\t".join([*words, self.source, *([f"nearest {self.task}"] if self.unknown else [])])

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
            shares={task: float(share) for task, share in zip(tasks, decisions.shares[i], strict=True) if share},
        )
        for i, source in enumerate(sources)
    ]


def encoder_of(
    checkpoint: Checkpoint, device: torch.device, threads: int, *, model: str | None, max_length: int | None
) -> Encoder:
    """The checkpoint as a network whose layers can be read. RetexError for a bare weight file."""
    network = Network.of(checkpoint.side_files(), checkpoint.reference, device, model=model, max_length=max_length)
    network.load(checkpoint.items(), checkpoint.reference)
    return Encoder(network, threads)


Answer = Identification | BadInput

Shapes = Mapping[str, Sequence[int | None]]
"""Sizes of ready model inputs by name; None where they differ from input to input."""


def shapes_of(examples: Sequence[Example]) -> dict[str, list[int | None]]:
    """What the ready model inputs among ``examples`` have in common; empty where there are none.

    The length of a sequence, a tensor of one dimension, is nothing of that kind, even where all were padded to one.
    """
    found: dict[str, list[int | None]] = {}
    for example in examples:
        for name, value in (example.tensors or {}).items():
            known = found.setdefault(name, list(value.shape))
            if len(known) == value.ndim:
                same = (a if a == b and value.ndim > 1 else None for a, b in zip(known, value.shape, strict=True))
                found[name] = list(same)
    return found


@dataclass(frozen=True)
class SignaturesFile:
    """An opened signature file: the signatures, and of which network's features they are made.

    ``reference``: the encoder where that is not the merged checkpoint. ``shapes``: see ``shapes_of``. ``metadata``: the
    header as it is written.
    """

    path: str
    signatures: Signatures
    reference: str | None
    fingerprint: str
    max_length: int | None
    shapes: Shapes
    metadata: Mapping[str, str]

    @classmethod
    def open(cls, path: str) -> Self:
        """RetexError for another kind of file and for a damaged one."""
        with open_artefact(path, format=FORMAT, versions={VERSION}) as file:
            try:
                header = json.loads(file.metadata["features"])
                reference = None if header["merged"] else header["reference"]
                fingerprint, max_length = header["fingerprint"], header["max_length"]
                recipe = json.loads(file.metadata["signatures"])
            except (KeyError, TypeError, ValueError) as error:
                raise RetexError(f"{path}: damaged header: {error}", "build the signatures again") from error
            signatures = Signatures.from_tensors({name: file.read(name) for name in file.tensors}, recipe)
            metadata = dict(file.metadata)
        return cls(path, signatures, reference, fingerprint, max_length, header.get("inputs", {}), metadata)

    def encoder(self, merged: str) -> Checkpoint:
        """The checkpoint whose features count: ``merged``, or the base. RetexError where it has become another."""
        checkpoint = open_checkpoint(self.reference or merged)
        found = checkpoint_fingerprint(checkpoint)
        if found != self.fingerprint:
            raise RetexError(
                f"{self.path}: built on another encoder: fingerprint {self.fingerprint[:16]}…, "
                f"{checkpoint.reference} has {found[:16]}…",
                "give the checkpoint that the signatures were built on, or build them again",
            )
        return checkpoint


class Identifier:
    """Signatures with their encoder, ready to be asked. ``shapes``: what ready model inputs have to look like."""

    def __init__(self, signatures: Signatures, encoder: Encoder, batch_size: int, shapes: Shapes | None = None) -> None:
        self.signatures = signatures
        self.tasks = signatures.tasks
        self._encoder = encoder
        self._batch_size = batch_size
        self._shapes = shapes or {}

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
        file = SignaturesFile.open(path)
        chosen, count = choose_device(device, progress), thread_count(threads)
        with file.encoder(merged) as checkpoint:
            return cls.of(file, checkpoint, chosen, model=model, threads=count, batch_size=batch_size)

    @classmethod
    def of(
        cls,
        file: SignaturesFile,
        encoder: Checkpoint,
        device: torch.device,
        *,
        model: str | None,
        threads: int,
        batch_size: int,
    ) -> Self:
        """With what ``file.encoder`` gave."""
        built = encoder_of(encoder, device, threads, model=model, max_length=file.max_length)
        return cls(file.signatures, built, batch_size, file.shapes)

    def features(self, examples: Sequence[Example], progress: Progress) -> Tensor:
        """What the encoder says of examples: float32 [n, layers, width]; one step of progress an example.

        RetexError for the first that the encoder cannot take.
        """
        return self._features(examples, progress).whole()

    def decide(self, examples: Sequence[Example], progress: Progress) -> Decisions:
        """What the signatures say of every example by itself; see ``features``."""
        return self.signatures.identify(self.features(examples, progress))

    def identify(self, items: Sequence[Item], progress: Progress) -> list[Answer]:
        """Every item by itself, in order; one that is bad, or that the encoder cannot take, is the answer itself."""
        places, features, bad = self._read(items, progress)
        answers: dict[int, Answer] = dict(bad)
        if places:
            sources = [items[i].source for i in places]
            found = identifications(sources, self.signatures.identify(features), self.tasks)
            answers.update(zip(places, found, strict=True))
        return [answers[i] for i in range(len(items))]

    def identify_batch(self, items: Sequence[Item], progress: Progress) -> list[Answer]:
        """All items together, which share a task: those that are of no use, then one answer from the others."""
        places, features, bad = self._read(items, progress)
        answers: list[Answer] = [bad[i] for i in sorted(bad)]
        if places:
            source = items[places[0]].source if len(places) == 1 else f"{len(places)} inputs"
            answers += identifications([source], self.signatures.identify_batch(features), self.tasks)
        return answers

    def _read(self, items: Sequence[Item], progress: Progress) -> tuple[list[int], Tensor, dict[int, BadInput]]:
        """Numbers of the items of use, their features [k, L, D], and the other items by number."""
        bad = {i: item for i, item in enumerate(items) if isinstance(item, BadInput)}
        progress.advance(len(bad))
        examples = {i: item for i, item in enumerate(items) if isinstance(item, Example)}
        places = list(examples)
        passed = self._features(list(examples.values()), progress)
        for k, error in passed.refused.items():
            bad[places[k]] = BadInput(examples[places[k]].source, error)
        return [places[k] for k in passed.kept], passed.values, bad

    def _features(self, examples: Sequence[Example], progress: Progress) -> Passed:
        """Of the examples that look like the reference inputs, can be encoded and give finite numbers."""
        refused = {i: error for i, example in enumerate(examples) if (error := self._misfit(example)) is not None}
        fine = [i for i in range(len(examples)) if i not in refused]
        progress.advance(len(refused))
        passed = self._encoder.read([examples[i] for i in fine], self._batch_size, progress)
        refused |= {fine[k]: error for k, error in passed.refused.items()}
        kept, values = [fine[k] for k in passed.kept], passed.values
        finite = torch.isfinite(values).flatten(1).all(1).tolist() if kept else []
        for i, good in zip(kept, finite, strict=True):
            if not good:
                words = f"{examples[i].source}: NaN or infinity in the features of this input"
                refused[i] = RetexError(words, "look at the input; it may hold NaN itself")
        return Passed(values[finite] if kept else values, [i for i in kept if i not in refused], refused)

    def _misfit(self, example: Example) -> RetexError | None:
        """Why ready model inputs are not like the reference inputs; None where they are, and for texts and images."""
        given = example.tensors
        if given is None or not self._shapes:
            return None
        if set(given) != set(self._shapes):
            expected, found = ", ".join(sorted(self._shapes)), ", ".join(sorted(given))
            return RetexError(f"{example.source}: has the tensors {found}, the reference inputs have {expected}")
        for name, shape in self._shapes.items():
            sizes = given[name].shape
            if len(sizes) != len(shape) or any(b not in (None, a) for a, b in zip(sizes, shape, strict=True)):
                wanted = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
                return RetexError(
                    f"{example.source}: {name!r} is {list(sizes)}, the reference inputs have {wanted}",
                    "bring it to that size",
                )
        return None


def read_inputs(inputs: Sequence[str]) -> Iterator[Item]:
    """Inputs as a person types them: files and folders of any kind that tasks may have, ``-`` for the lines of standard
    input, or a text with a blank in it. What cannot be read is an item, too.

    One word is taken for a path, so that a mistyped file name is an error and not a text.
    """
    for given in inputs:
        if given == "-":
            yield from read_stream(sys.stdin.buffer, "stdin")
        elif not Path(given).exists() and any(character.isspace() for character in given):
            yield Example(text=given, source=repr(given if len(given) <= 40 else given[:37] + "..."))
        else:
            try:
                yield from read_items(Path(given).expanduser())
            except RetexError as error:
                yield BadInput(given, error)
