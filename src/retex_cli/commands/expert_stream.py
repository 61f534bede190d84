"""An expert on its way from the merged checkpoint to an output: read, made, written and hashed, a few MB at a time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from retex_cli.commands.blocks import Block, take_in
from retex_cli.commands.offsets_file import OffsetsFile, Part
from retex_cli.io.provenance import TensorDigest, checkpoint_digests, fingerprint, known_digests
from retex_cli.io.writer import Claim, Writer
from retex_cli.offsets.blocks import BLOCK
from retex_cli.offsets.predict import Embedding, Predictor
from retex_cli.parallel import ordered_map
from retex_cli.progress import Progress

GROUP = 4
"""Blocks of a tensor that one thread makes and writes one after the other: waking another takes as long as a block."""
AHEAD = 2
"""Groups that wait for what is left to do with them, besides those that are being made."""
FAR_AHEAD = 12
"""And where nothing is: they hold no memory, and no thread waits for one that is slow."""


@dataclass(frozen=True)
class Recovery:
    """An expert, or a mix of experts with the head of one, of an offsets file; sums are made on ``device``."""

    file: OffsetsFile
    predictor: Predictor
    embedding: Embedding
    head: str
    device: torch.device

    @property
    def is_exact(self) -> bool:
        """Whether it is an expert bit for bit."""
        return self.file.is_exact(self.embedding, self.head)

    def blocks(self, part: Part) -> list[Block]:
        """How one tensor is made."""
        return list(self.file.blocks(part, self.predictor, self.embedding, self.head, self.device))


def stream(recovery: Recovery, parts: Sequence[Part], writer: Writer, threads: int, progress: Progress) -> None:
    """Make and write ``parts``, the tensors that the writer awaits, in order.

    RetexError where the merged checkpoint is not the one that the offsets belong to, and where a task that should come
    back bit for bit does not.
    """
    hashes, room = _Hashes(recovery), _Room()
    progress.start(f"recovering {recovery.head}", len(parts))
    hashing: deque[Future[None]] = deque()
    ahead = AHEAD if writer.in_order or any(map(hashes.want, parts)) else FAR_AHEAD
    with ThreadPoolExecutor(1) as beside:
        for job, rests in ordered_map(
            lambda job: _make(job, recovery, writer, hashes, room), _jobs(recovery, parts, writer), threads, ahead
        ):
            for (_, claim), rest in zip(job.blocks, rests, strict=True):
                if rest.data is not None:
                    writer.fill(claim, rest.data)
            if hashes.want(job.part):
                hashing.append(beside.submit(hashes.take, job, rests))
            while len(hashing) > AHEAD:
                hashing.popleft().result()
            progress.advance(job.last)
        for hashed in hashing:
            hashed.result()
    hashes.check(threads)


@dataclass(frozen=True)
class _Job:
    """Blocks of one tensor that lie side by side, and where they go. ``last``: whether these are its last ones."""

    part: Part
    blocks: Sequence[tuple[Block, Claim]]
    last: bool


@dataclass(frozen=True)
class _Rest:
    """What of a block is still to be hashed, as it was read and as it was made, or written, each in order."""

    merged: Tensor | None
    value: Tensor | None
    data: Tensor | None


def _jobs(recovery: Recovery, parts: Sequence[Part], writer: Writer) -> Iterator[_Job]:
    for part in parts:
        blocks = recovery.blocks(part)
        ends = [*(block.at for block in blocks[1:]), part.spec.numel]
        for first in range(0, len(blocks), GROUP):
            group = range(first, min(first + GROUP, len(blocks)))
            claims = [(blocks[k], writer.claim(ends[k] - blocks[k].at, part.spec.dtype)) for k in group]
            yield _Job(part, claims, first + GROUP >= len(blocks))


def _make(job: _Job, recovery: Recovery, writer: Writer, hashes: _Hashes, room: _Room) -> tuple[_Job, list[_Rest]]:
    rests = []
    for block, claim in job.blocks:
        keep = hashes.want(job.part)
        held = keep or writer.in_order  # by others, when the next block is read
        merged = recovery.file.source(job.part, block, None if held else room.bytes)
        in_place = not keep and recovery.device.type == "cpu" and merged.dtype == job.part.spec.dtype == block.sums
        value = block.make(merged, merged if in_place else None)
        data = value.to("cpu", job.part.spec.dtype)
        if not writer.in_order:
            writer.fill(claim, data)
        rests.append(_Rest(merged if keep else None, value if keep else None, data if writer.in_order else None))
    return job, rests


class _Room(threading.local):
    """Bytes for a block, the same ones every time for a thread: fresh memory costs as much as what is done in it."""

    def __init__(self) -> None:
        self.bytes = torch.empty(BLOCK * torch.float32.itemsize, dtype=torch.uint8)


class _Hashes:
    """SHA-256 of the merged tensors, but for those that are known from before, and of an exact expert's."""

    def __init__(self, recovery: Recovery) -> None:
        self._recovery, self._exact = recovery, recovery.is_exact
        self._known = known_digests(recovery.file.merged)
        self._merged: dict[str, TensorDigest] = {}
        self._expert: dict[str, TensorDigest] = {}

    def want(self, part: Part) -> bool:
        """Whether anything of this tensor is hashed."""
        return self._exact or (part.merged is not None and part.merged not in self._known)

    def take(self, job: _Job, rests: Sequence[_Rest]) -> None:
        """The blocks of all tensors, in order."""
        name = job.part.merged
        for (block, _), rest in zip(job.blocks, rests, strict=True):
            if name is not None and name not in self._known and rest.merged is not None:
                self._merged.setdefault(name, TensorDigest()).update(rest.merged)
            if self._exact and rest.value is not None:
                take_in(self._expert.setdefault(job.part.spec.name, TensorDigest()), block, rest.value)

    def check(self, threads: int) -> None:
        """After the last block: RetexError unless these were the offsets' merged checkpoint and the very expert."""
        file, head, nothing = self._recovery.file, self._recovery.head, TensorDigest()
        found = {name: digest.digest() for name, digest in self._merged.items()}
        file.check_merged(checkpoint_digests(file.merged, threads, found))
        if self._exact:
            specs = [part.spec for part in file.parts(head)]
            made = {s.name: (s.dtype, s.shape, self._expert.get(s.name, nothing).digest()) for s in specs}
            file.check_expert(head, fingerprint(made))
