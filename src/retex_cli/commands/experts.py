"""Experts that answer inside a running program: each input is identified and answered by its own task's expert."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retex_cli.commands.identifier import Identification, Identifier, SignaturesFile, encoder_of
from retex_cli.commands.predictor import Predictor
from retex_cli.errors import RetexError, UsageError
from retex_cli.io.inputs import BadInput, Example, Item, checked_text
from retex_cli.models.classifier import Heard, answer, likeliest
from retex_cli.models.device import choose_device
from retex_cli.models.network import Network
from retex_cli.models.processor import picture
from retex_cli.progress import Progress, Silent
from retex_cli.serving.places import lend

Given = str | PathLike[str] | NDArray[np.uint8] | Mapping[str, Tensor]
"""A text, or the path of an image where the model reads images; uint8 [height, width, 3]; model inputs by name, without
a batch dimension."""

HERE = 0
"""Batches one after another in the calling thread, on torch's own threads: calls wait for each other anyway."""


@dataclass(frozen=True)
class Reply:
    """What one input is and what its expert says.

    ``probability`` (of the nearest task), ``margin`` and ``unknown`` as ``retex identify`` gives them; an unknown input
    is answered like any other. ``shares``: which experts were asked, and how much each counts: the nearest task's
    alone, or where that is unsure several (see ``signatures.Decisions``). ``label`` is the name that is most probable
    by all of them, ``task`` and ``logits`` (float32 [classes of the task], on the CPU) are of the one who says so most.
    ``error``: why there is no answer; the rest is None then.
    """

    task: str | None = None
    label: str | None = None
    logits: Tensor | None = None
    probability: float | None = None
    margin: float | None = None
    unknown: bool | None = None
    shares: Mapping[str, float] | None = None
    error: RetexError | None = None


class Experts:
    """All experts of an offsets file behind one call: ``experts(["a text", "another"])``.

    Memory: the merged weights, which identify; one more set of weights, switched in place between the experts; every
    task's head; the decoded offsets. ``nbytes`` says how much that is. Calls may come from several threads; they are
    answered one after another. An input whose task is unsure takes a pass of every expert that is asked, and a switch
    to it where no other input needs it: ``blend=False`` asks the nearest task's alone.
    """

    def __init__(
        self,
        predictor: Predictor,
        identifier: Identifier,
        networks: Mapping[str, Network],
        batch_size: int,
        reads: str,
        *,
        blend: bool = True,
    ) -> None:
        self._predictor = predictor
        self._identifier = identifier
        self._networks = networks
        self._batch_size = batch_size
        self._reads = reads
        self._blend = blend
        self._lock = threading.Lock()
        self._current: str | None = None
        memory: dict[tuple[str, torch.dtype], Tensor] = {}
        for task, network in networks.items():  # each gets its head once, and all the same memory for the rest
            predictor.apply_(network.module, task)
            for name, variable in predictor.shared(network.module, task).items():
                lend(variable, memory.setdefault((name, variable.dtype), variable.data))

    @classmethod
    def load(
        cls,
        merged: str,
        offsets: str,
        signatures: str,
        *,
        model: str | None = None,
        blend: bool = True,
        batch_size: int = 64,
        device: str = "auto",
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Read the three artefacts and build every task's network; nothing else is needed.

        ``model`` ("package.module:function") builds networks that transformers cannot. ``blend``: inputs whose task is
        unsure are answered by several experts, a pass for each. ``batch_size``: inputs per forward pass.
        ``threads`` decode and switch. RetexError for files that do not belong together.
        """
        watched = progress or Silent()
        chosen = choose_device(device, watched)
        file = SignaturesFile.open(signatures)
        predictor = Predictor.load(merged, offsets, device=chosen.type, threads=threads, progress=watched)
        predictor.check_covers(file.signatures.tasks, signatures)
        with file.encoder(merged) as checkpoint:
            encoder = encoder_of(checkpoint, chosen, HERE, model=model, max_length=file.max_length)
        if file.reference is None:
            predictor.lend_(encoder.network.module)
        identifier = Identifier(file.signatures, encoder, batch_size, file.shapes)
        watched.start("building the experts", len(file.signatures.tasks))
        networks = {}
        for task in file.signatures.tasks:
            name = f"{offsets}: task {task!r}"
            networks[task] = Network.of(predictor.side_files(task), name, chosen, model=model)
            watched.advance()
        return cls(predictor, identifier, networks, batch_size, encoder.network.reads, blend=blend)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that can be identified, sorted."""
        return tuple(self._networks)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held: merged weights, decoded offsets, the switched weights and the heads."""
        held = {
            value.data_ptr(): value.nbytes
            for network in self._networks.values()
            for value in network.module.state_dict().values()
            if isinstance(value, Tensor)
        }
        return self._predictor.nbytes + sum(held.values())

    def __call__(self, inputs: Sequence[Given]) -> list[Reply]:
        """A reply for every input, in order, by the expert of its own task; inputs of one expert are answered together.

        An input that cannot be used has the reason in its reply, and the others go on.
        """
        if isinstance(inputs, str):
            raise UsageError("one text is no list of inputs", "give a list: experts([text])")
        items = [self._item(f"inputs[{number}]", given) for number, given in enumerate(inputs)]
        replies: dict[int, Reply] = {}
        jobs: list[_Job] = []
        with self._lock:
            found = self._identifier.identify(items, Silent())
            for number, (item, one) in enumerate(zip(items, found, strict=True)):
                if isinstance(item, BadInput) or isinstance(one, BadInput):
                    replies[number] = Reply(error=one.error if isinstance(one, BadInput) else None)
                else:
                    jobs.append(_Job(number, item, one, one.experts(blend=self._blend)))
            self._answer(jobs)
        replies |= {job.number: job.reply() for job in jobs}
        return [replies[number] for number in range(len(items))]

    def _answer(self, jobs: Sequence[_Job]) -> None:
        """Let every job hear of its experts, one expert after the other; the one at hand goes first."""
        asked: dict[str, list[_Job]] = {}
        for job in jobs:
            for task in job.shares:
                asked.setdefault(task, []).append(job)
        for task in sorted(asked, key=lambda task: (task != self._current, task)):
            self._switch(task)
            network, some = self._networks[task], asked[task]
            passed = answer(network, [job.example for job in some], self._batch_size, HERE, Silent())
            for k, error in passed.refused.items():
                some[k].error = error
            for k, logits in zip(passed.kept, passed.values, strict=True):
                some[k].heard[task] = Heard(network.labels, logits, some[k].shares[task])

    def _switch(self, task: str) -> None:
        if task != self._current:
            self._current = None  # whatever an error leaves behind is no expert
            self._predictor.apply_(self._networks[task].module, task, head=False)
            self._current = task

    def _item(self, source: str, given: Given) -> Item:
        try:
            example = _example(source, given, images=self._reads == "images")
            if example.image is not None and self._reads == "images":
                example = replace(example, image=picture(example))  # once, for both networks, and not under the lock
            return example
        except RetexError as error:
            return BadInput(source, error)


@dataclass
class _Job:
    """One input of use: its place in the call, what was identified, who is asked, and what they have said."""

    number: int
    example: Example
    found: Identification
    shares: Mapping[str, float]
    heard: dict[str, Heard] = field(default_factory=dict)
    error: RetexError | None = None

    def reply(self) -> Reply:
        if not self.heard:
            return Reply(error=self.error)
        found, (label, task) = self.found, likeliest(self.heard)
        sure = found.probability, found.margin, found.unknown
        return Reply(task, label, self.heard[task].logits, *sure, shares=self.shares)


def _example(source: str, given: object, *, images: bool) -> Example:
    """RetexError for what is no input at all."""
    if isinstance(given, str) and not images:
        return Example(text=checked_text(given, source), source=source)
    if isinstance(given, (str, PathLike)):
        return Example(image=Path(given), source=source)
    if isinstance(given, np.ndarray):
        if given.dtype != np.uint8 or given.ndim != 3 or given.shape[2] != 3 or not given.size:
            shape = list(given.shape)
            raise RetexError(f"{source}: an array of {given.dtype} {shape}", "images are uint8 [height, width, 3]")
        return Example(image=given, source=source)
    if isinstance(given, Mapping) and given and all(isinstance(value, Tensor) for value in given.values()):
        return Example(tensors=given, source=source)
    raise RetexError(
        f"{source}: {type(given).__name__} is no input",
        "give texts, paths or arrays of images, or model inputs by name: {'pixel_values': tensor}",
    )
