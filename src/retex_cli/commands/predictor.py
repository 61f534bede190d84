"""Experts inside a loaded model: what ``retex recover`` would write, copied into the module's own tensors instead."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Self

import torch
from torch import Tensor

from retex_cli.commands.blocks import Block, take_in
from retex_cli.commands.offsets_file import OffsetsFile, Part
from retex_cli.commands.recover import check_shares, head_of
from retex_cli.errors import RetexError
from retex_cli.io.checkpoint import open_checkpoint
from retex_cli.io.naming import canonical
from retex_cli.io.provenance import TensorDigest, known_digests, tensor_digest
from retex_cli.io.writer import TensorSpec
from retex_cli.models.device import choose_device
from retex_cli.offsets import predict
from retex_cli.offsets.stream import Factors
from retex_cli.parallel import ordered_map, thread_count
from retex_cli.progress import Progress, Silent
from retex_cli.serving.places import Places, Shape, Wanted, fill, lend

_NOTHING = torch.empty(0)

Expert = str | Mapping[str, float] | None
"""A task, shares of several tasks that sum to one, or None for the merged weights themselves."""


class Predictor:
    """The experts of an offsets file, ready to be switched inside any model of the same architecture.

    Kept on ``device``: the merged weights, once, and the decoded offsets of every task used so far (a few times their
    bytes in the file); ``nbytes`` says how much that is. The model's own weights are the only other copy.

    Arithmetic is that of ``retex recover --device`` with the same device, so ``apply_`` leaves in the model bit by bit
    what loading the recovered checkpoint into it would: a model in another element type than the expert's holds the
    expert's values rounded to its own. One predictor may be used from several threads; a model that is being switched
    must not be running.
    """

    def __init__(self, file: OffsetsFile, weights: Mapping[str, Tensor], device: torch.device, threads: int) -> None:
        self._file = file
        self._weights = weights
        self._device = device
        self._threads = threads
        self._factors: dict[str, dict[str, Factors]] = {}
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls,
        merged: str,
        offsets: str,
        *,
        device: str = "auto",
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Read the merged weights once and check that the offsets were fitted to them.

        ``merged`` and ``offsets`` as for ``recover``; ``device`` is where weights are kept and offsets are added.
        RetexError for damaged files and for a merged checkpoint that the offsets do not belong to.
        """
        with open_checkpoint(merged) as checkpoint:
            file = OffsetsFile(offsets, checkpoint)
            chosen = choose_device(device, progress or Silent())
            count = thread_count(threads)

            known = known_digests(checkpoint)

            def read(name: str) -> tuple[bytes, Tensor]:
                tensor = checkpoint.read(name)
                return known.get(name) or tensor_digest(tensor), tensor.to(chosen)

            found = dict(zip(checkpoint.tensors, ordered_map(read, checkpoint.tensors, count), strict=True))
            file.check_merged({name: digest for name, (digest, _) in found.items()})
        return cls(file, {name: tensor for name, (_, tensor) in found.items()}, chosen, count)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names, sorted."""
        return tuple(self._file.tasks)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held: merged weights and decoded offsets."""
        factors = [factor for held in self._factors.values() for factor in held.values()]
        return sum(t.nbytes for t in self._weights.values()) + sum(factor.nbytes for factor in factors)

    def apply_(self, model: torch.nn.Module, expert: Expert, *, head: bool | str = True) -> None:
        """Turn ``model``, whatever weights it has now, into an expert, a mix of experts or (None) the merged model.

        The model's state dict has the merged checkpoint's names or an expert's; its parameters stay the same objects.
        With a task, its task tensors (a classifier, say) and extra rows of a grown vocabulary go in, too; with a mix
        those of the largest share. ``head`` names another task for them, ``head=False`` leaves the model's own where
        they are. None fills only what the merged checkpoint has.

        RetexError, before anything is written, names a tensor without a place in the model or with one of another
        shape, a tensor of the model that neither the merged checkpoint nor the expert has (``head=False`` allows
        those), and a task whose offsets are damaged. UsageError for an unknown task and for shares that do not sum to
        one.
        """
        embedding, source = self._request(expert, head)
        whole = source != "" and head is not False
        places = Places(model)
        parts = self._parts(source, whole=whole)
        found = places.match([self._wanted(part, whole=whole) for part in parts])
        jobs = [(part, place) for part, place in zip(parts, found, strict=True) if place is not None]
        if whole and (left := places.left_over(place for _, place in jobs)):
            raise RetexError(
                f"{places.kind} has the tensor {left[0]!r}, which expert {source!r} does not have",
                "head=False leaves alone what the expert does not have",
            )
        with self._lock:
            predictor = self._decoded(embedding)

            def put(job: tuple[Part, Tensor]) -> None:
                part, place = job
                digest = TensorDigest() if self._file.is_exact(embedding, source) else None
                with torch.inference_mode():
                    for block in self._file.blocks(part, predictor, embedding, source, self._device):
                        value = block.make(self._source(part, block), self._sum_in(place, part, block))
                        if digest is not None:
                            take_in(digest, block, value)
                        fill(place, block.at, value)

            for _ in map(put, jobs) if self._device.type != "cpu" else ordered_map(put, jobs, self._threads):
                pass

    def shared(self, model: torch.nn.Module, task: str | None) -> dict[str, Tensor]:
        """Merged name -> the parameter or buffer of ``model`` that holds an expert's part of it, of the merged shape.

        None for ``task``: a model of the merged checkpoint's own class. RetexError as for ``apply_``.
        """
        parts = [part for part in self._parts(task or "", whole=False) if part.merged is not None]
        places = Places(model)
        found = places.match([self._wanted(part, whole=False) for part in parts])
        return {
            part.merged: places.variable(place)
            for part, place in zip(parts, found, strict=True)
            if place is not None and part.merged and place.shape == self._weights[part.merged].shape
        }

    def lend_(self, model: torch.nn.Module) -> None:
        """Let ``model``, of the merged checkpoint's class and with its weights, use those that are kept here instead of
        a copy, where they are of the same type. It must only read them."""
        for name, place in self.shared(model, None).items():
            lend(place, self._weights[name])

    def check_covers(self, tasks: Iterable[str], signatures: str) -> None:
        """RetexError where the file ``signatures`` can identify a task without offsets."""
        self._file.check_covers(tasks, signatures)

    def side_files(self, task: str) -> dict[str, bytes]:
        """Config, tokenizer and other files of a task's expert by name."""
        return self._file.side_files(task)

    def close(self) -> None:
        """Give the offsets file back; what was switched stays as it is."""
        self._file.close()

    def _request(self, expert: Expert, head: bool | str) -> tuple[dict[str, float], str]:
        """The embedding, and the task whose names, types and task tensors are meant; "" for the merged weights."""
        if expert is None:
            return {}, ""
        embedding = {expert: 1.0} if isinstance(expert, str) else dict(sorted(expert.items()))
        check_shares(embedding)
        source = head_of(embedding, head if isinstance(head, str) else None)
        for task in (*embedding, source):
            self._file.task(task)
        return embedding, source

    def _parts(self, source: str, *, whole: bool) -> list[Part]:
        """What goes into the model: the expert's tensors, without its own ones unless ``whole``, or the merged ones."""
        if source:
            return [part for part in self._file.parts(source) if whole or part.merged is not None]
        return [
            Part(TensorSpec(name, weight.dtype, tuple(weight.shape)), name) for name, weight in self._weights.items()
        ]

    def _wanted(self, part: Part, *, whole: bool) -> Wanted:
        records, name = self._file.tasks.values(), part.merged
        names, shapes = [part.spec.name], [part.spec.shape]
        required = part.spec.dtype.is_floating_point  # integers are buffers of other versions, position ids say
        if name is not None:
            names += [name, *(record.expert_name(name) for record in records)]
        if name is not None and not whole:
            shapes += self._shapes(name)
            required &= not any(name in record.absent for record in records)  # a model of such an expert's class
        return Wanted(tuple(dict.fromkeys([*names, *map(canonical, names)])), tuple(shapes), required)

    def _shapes(self, name: str) -> list[Shape]:
        """Shapes that a merged tensor has in itself and, where their vocabulary has grown, in the experts."""
        shape = tuple(self._weights[name].shape)
        grown = [self._file.rows(task, name) for task, record in self._file.tasks.items() if name in record.rows]
        return [shape, *((shape[0] + rows, *shape[1:]) for rows in grown)]

    def _source(self, part: Part, block: Block) -> Tensor:
        """The elements of the merged tensor that a block is made from, as stored."""
        if part.merged is None:
            return _NOTHING
        return self._weights[part.merged].reshape(-1)[slice(*block.source)]

    def _sum_in(self, place: Tensor, part: Part, block: Block) -> Tensor | None:
        """Where the sum belongs, if it can be made there, which saves a copy."""
        here = place.dtype == part.spec.dtype == block.sums and place.device == self._device and place.is_contiguous()
        stop = block.source[1]
        return place.view(-1)[block.at : stop] if here and block.at < stop <= place.numel() else None

    def _decoded(self, embedding: predict.Embedding) -> predict.Predictor:
        for task in embedding:
            if task not in self._factors:
                held = self._file.factors(task)
                self._factors[task] = {name: factors.to(self._device) for name, factors in held.items()}
        return predict.Predictor(self._factors)
