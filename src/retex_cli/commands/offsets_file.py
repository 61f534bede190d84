"""The offsets artefact: for every task what turns the merged checkpoint back into its expert.

Tensors of the file: ``offsets/TASK`` the coded offsets (bytes), ``tensors/TASK/NAME`` task tensors verbatim,
``rows/TASK/NAME`` the rows that the expert has beyond the merged checkpoint's, ``exact/TASK/NAME`` what a lossless
task's prediction lacks, ``common`` the coded offsets that several tasks have in common, ``files/SHA256`` side files
that the merged folder does not have, ``digests`` the start of the SHA-256 of every merged tensor. The header holds the
rest; ``docs/format.md`` is its contract.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from retex_cli.commands import checks
from retex_cli.commands.blocks import Block, take_in
from retex_cli.commands.corrections import Exact
from retex_cli.commands.offsets_header import COMMON, TaskRecord, open_offsets, share_of, task_record
from retex_cli.errors import RetexError
from retex_cli.io.checkpoint import Checkpoint, TensorInfo
from retex_cli.io.provenance import TensorDigest, fingerprint
from retex_cli.io.writer import TensorSpec
from retex_cli.models.device import has_fast_bf16
from retex_cli.offsets.blocks import columns_of, spans
from retex_cli.offsets.coder import CorruptOffsets
from retex_cli.offsets.fixed import prediction
from retex_cli.offsets.predict import Embedding, Offset, Predictor, Together
from retex_cli.offsets.stream import Factors, Shape, decode

Layout = list[tuple[str, Shape]]


def layout_of(merged: Checkpoint) -> Layout:
    """Name and shape of every tensor that can have an offset: the floating-point ones, by name."""
    return [(name, info.shape) for name, info in sorted(merged.tensors.items()) if info.dtype.is_floating_point]


@dataclass(frozen=True)
class Part:
    """One tensor of a recovered expert: ``spec`` says what is written; ``merged`` is the tensor it is made from, None
    for a task tensor, which lies in the offsets file."""

    spec: TensorSpec
    merged: str | None


class OffsetsFile:
    """An opened offsets artefact and the merged checkpoint that it belongs to."""

    def __init__(self, path: str, merged: Checkpoint) -> None:
        self.path = path
        self.merged = merged
        self.file, self._header = open_offsets(path)
        self.tasks = self._header.records
        self.fingerprint = self.file.metadata["merged"]
        self._check_layout()

    def _check_layout(self) -> None:
        names = sorted(self.merged.tensors)
        count = self.file.tensors["digests"].shape[0]
        if count != len(names):
            raise RetexError(
                f"{self.path}: belongs to another merged checkpoint: it has {count} tensors, "
                f"{self.merged.reference} has {len(names)}",
                "give the merged checkpoint that the offsets were fitted to, or fit them again",
            )

    def check_merged(self, digests: Mapping[str, bytes]) -> None:
        """RetexError unless ``digests`` (SHA-256 of every merged tensor) are those the offsets were fitted to."""
        stored = self.file.read("digests")
        for name, row in zip(sorted(self.merged.tensors), stored, strict=True):
            expected = bytes(row.tolist())
            if digests[name][: len(expected)] != expected:
                raise RetexError(
                    f"{self.path}: belongs to another merged checkpoint: tensor {name!r} had SHA-256 "
                    f"{expected.hex()}…, in {self.merged.reference} it has {digests[name][: len(expected)].hex()}…",
                    "give the merged checkpoint that the offsets were fitted to, or fit them again",
                )
        found = fingerprint_of(self.merged, digests)
        if found != self.fingerprint:  # the same numbers under other names or in another shape
            raise RetexError(
                f"{self.path}: belongs to another merged checkpoint: its fingerprint was {self.fingerprint[:16]}…, "
                f"that of {self.merged.reference} is {found[:16]}…",
                "give the merged checkpoint that the offsets were fitted to, or fit them again",
            )

    def check_expert(self, task: str, found: str) -> None:
        """RetexError unless ``found`` is the fingerprint of a lossless task's expert."""
        expected = self.task(task).fingerprint
        if found != expected:
            raise RetexError(
                f"{self.path}: the expert of task {task!r} does not come back bit for bit: its fingerprint was "
                f"{expected[:16]}…, that of what was recovered is {found[:16]}…",
                "a task tensor is damaged: get the file again",
            )

    def task(self, name: str) -> TaskRecord:
        """UsageError, with the closest names, for a task that the file does not have; RetexError for a damaged one."""
        if name in self._header.damaged:
            raise checks.damaged(self.path, name, self._header.damaged[name])
        return task_record(self.path, self.tasks, name)

    def check_covers(self, tasks: Iterable[str], signatures: str) -> None:
        """RetexError where the ``signatures`` file can identify a task that is not here."""
        lost = [task for task in tasks if task not in self.tasks]
        if lost:
            raise RetexError(
                f"{signatures}: can identify task {lost[0]!r}, which {self.path} does not have",
                "build both files from the same tasks",
            )

    def predictor(self, tasks: Iterable[str]) -> Predictor:
        """Decoded offsets of these tasks; see ``factors``."""
        return Predictor({task: self.factors(task) for task in tasks})

    def factors(self, task: str) -> Mapping[str, Factors]:
        """Decoded offsets of one task by merged name. RetexError where its bytes are damaged; others still decode."""
        record = self.task(task)
        try:
            if f"offsets/{task}" not in self.file.tensors:
                raise CorruptOffsets("they are not there")
            data = self.file.read(f"offsets/{task}").numpy().tobytes()
            if hashlib.sha256(data).hexdigest() != record.checksum:
                raise CorruptOffsets("its SHA-256 is not the one in the header")
            own = decode(data, layout_of(self.merged))
        except CorruptOffsets as error:
            raise RetexError(
                f"{self.path}: the offsets of task {task!r} are damaged: {error}",
                "other tasks can still be recovered; get the file again for this one",
            ) from error
        return Together(self._common, own) if record.common else own

    @cached_property
    def common_data(self) -> bytes:
        """Coded offsets that several tasks have in common; empty where they have none. RetexError for damage."""
        if not any(record.common for record in self.tasks.values()):
            return b""
        data = self.file.read(COMMON).numpy().tobytes() if COMMON in self.file.tensors else b""
        if hashlib.sha256(data).hexdigest() != self.file.metadata.get(COMMON):
            raise self._common_damaged("they are not there" if not data else "their SHA-256 is not the header's")
        return data

    @cached_property
    def _common(self) -> Mapping[str, Factors]:
        """``common_data`` decoded."""
        try:
            return decode(self.common_data, layout_of(self.merged))
        except CorruptOffsets as error:
            raise self._common_damaged(str(error)) from error

    def _common_damaged(self, why: str) -> RetexError:
        return RetexError(
            f"{self.path}: the offsets that its tasks have in common are damaged: {why}", "get the file again"
        )

    def offset_bytes(self, task: str) -> int:
        """Bytes of a task's coded offsets, with an equal share of what it has in common with others."""
        record = self.task(task)
        return record.offset_bytes + (share_of(self.tasks, self.file.tensors[COMMON].nbytes) if record.common else 0)

    def rows(self, task: str, merged_name: str) -> int:
        """How many rows the expert of ``task`` has beyond the merged tensor's; 0 for most."""
        record = self.task(task)
        if merged_name not in record.rows:
            return 0
        return self._own(task, f"rows/{task}/{record.expert_name(merged_name)}").shape[0]

    def _own(self, task: str, name: str) -> TensorInfo:
        """A tensor that is the task's own. RetexError where it is missing."""
        if name not in self.file.tensors:
            raise checks.damaged(self.path, task, f"tensor {name!r} is not there")
        return self.file.tensors[name]

    def _read_own(self, task: str, name: str) -> Tensor:
        """Its data. RetexError where they are not what was written."""
        self._own(task, name)
        tensor = self.file.read(name)
        if self._header.checks and self._header.checks.get(name) != checks.of_tensor(tensor):
            raise checks.damaged(self.path, task, f"tensor {name!r} has another digest")
        return tensor

    def parts(self, head: str) -> list[Part]:
        """The tensors of an expert with the head of task ``head``, by name."""
        record = self.task(head)
        parts = []
        for name, info in self.merged.tensors.items():
            if name in record.absent:
                continue
            expert_name = record.expert_name(name)
            shape = info.shape
            if name in record.rows:
                shape = (shape[0] + self.rows(head, name), *shape[1:])
            parts.append(Part(TensorSpec(expert_name, record.expert_dtype(expert_name), shape), name))
        start = f"tensors/{head}/"
        for name in self._header.checks:
            if name.startswith(start):
                self._own(head, name)
        for name, info in self.file.tensors.items():
            if name.startswith(start):
                parts.append(Part(TensorSpec(name.removeprefix(start), info.dtype, info.shape), None))
        return sorted(parts, key=lambda part: part.spec.name)

    def is_exact(self, embedding: Embedding, head: str) -> bool:
        """Whether ``make`` gives the very bits of an expert: one lossless task alone, with its own head."""
        return dict(embedding) == {head: 1.0} and self.task(head).correction_bytes > 0

    def blocks(
        self, part: Part, predictor: Predictor, embedding: Embedding, head: str, device: torch.device
    ) -> Iterator[Block]:
        """How one part is made, in order.

        Where ``is_exact`` its blocks are the expert's tensor in the expert's own type, on the CPU, and RetexError if
        they would not be. Otherwise sums are in float32 (see ``_sums_in``), on ``device``; what has no offset stays
        where it is.
        """
        spec, name = part.spec, part.merged
        if name is None:
            yield self._stored(head, f"tensors/{head}/{spec.name}", 0)
            return
        info = self.merged.tensors[name]
        if self.is_exact(embedding, head) and info.dtype.is_floating_point:
            yield from self._exact(spec.name, info, predictor.factors(head, name), head)
        else:
            offset = predictor.offset(name, embedding, device, _sums_in(info.dtype, spec.dtype, device))
            sums = torch.float32 if offset is None else offset.dtype
            for start, stop in spans(info.shape, device):
                yield Block(start, (start, stop), partial(_sum, offset, start, spec.dtype), sums=sums)
        if info.shape != spec.shape:
            yield self._stored(head, f"rows/{head}/{spec.name}", info.numel)

    def _stored(self, task: str, name: str, at: int) -> Block:
        """A tensor of the task's own, to be put at ``at``."""
        return Block(at, (0, 0), lambda merged, out: self._read_own(task, name).reshape(-1))

    def _exact(self, expert_name: str, info: TensorInfo, factors: Factors | None, task: str) -> Iterator[Block]:
        """An exact tensor of a lossless task; integers and their order are the CPU's, wherever the weights are kept."""
        dtype, columns = self.task(task).expert_dtype(expert_name), columns_of(info.shape)
        here = factors and factors.to(torch.device("cpu"))
        predicted = prediction(info.name, torch.empty(0, columns), here, dtype)
        rows = info.numel // columns if columns else 0
        return Exact(self.file, self.path, task).blocks(expert_name, rows, columns, predicted, dtype)

    def make(self, part: Part, predictor: Predictor, embedding: Embedding, head: str) -> Tensor:
        """A whole part, on the CPU, from the merged checkpoint; see ``blocks``."""
        whole, digest = torch.empty(part.spec.shape, dtype=part.spec.dtype), TensorDigest()
        exact = self.is_exact(embedding, head)
        for block in self.blocks(part, predictor, embedding, head, torch.device("cpu")):
            value = block.make(self.source(part, block), None)
            if exact:
                take_in(digest, block, value)
            whole.view(-1)[block.at : block.at + value.numel()] = value
        return whole

    def source(self, part: Part, block: Block, scratch: Tensor | None = None) -> Tensor:
        """The elements of the merged tensor that a block is made from, as stored; in ``scratch``, bytes of anything,
        where these are given and hold them."""
        start, stop = block.source
        dtype = torch.uint8 if part.merged is None else self._type(part.merged)
        nbytes = (stop - start) * dtype.itemsize
        if scratch is not None and nbytes <= scratch.numel():
            merged = scratch[:nbytes].view(dtype)
        else:
            merged = torch.empty(stop - start, dtype=dtype)
        if part.merged is not None:
            self.merged.read_into(part.merged, start, merged)
        return merged

    def _type(self, name: str) -> torch.dtype:
        return self.merged.tensors[name].dtype

    def side_files(self, task: str) -> dict[str, bytes]:
        """Config, tokenizer and other files of a task's expert. RetexError names one that is nowhere to be found."""
        ours = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in self.merged.side_files().values()}
        found = {}
        for name, digest in self.task(task).files.items():
            if f"files/{digest}" in self.file.tensors:
                found[name] = self.file.read(f"files/{digest}").numpy().tobytes()
                if hashlib.sha256(found[name]).hexdigest() != digest:
                    raise checks.damaged(self.path, task, f"its file {name} has another SHA-256")
            elif digest in ours:
                found[name] = ours[digest].read_bytes()
            else:
                raise RetexError(
                    f"{self.path}: {name} of task {task!r} was the merged folder's own file, and "
                    f"{self.merged.reference} no longer has it",
                    "give the whole merged folder, not only its weights",
                )
        return found

    def close(self) -> None:
        self.file.close()


def _sums_in(stored: torch.dtype, wanted: torch.dtype, device: torch.device) -> torch.dtype:
    """float32; bfloat16 where that is what is read and written and products in it take a processor half the time. They
    are summed in float32, and the expert's values are rounded once either way."""
    narrow = stored == wanted == torch.bfloat16 and device.type == "cpu" and has_fast_bf16(device)
    return torch.bfloat16 if narrow else torch.float32


def _sum(offset: Offset | None, start: int, dtype: torch.dtype, merged: Tensor, out: Tensor | None) -> Tensor:
    return (merged if offset is None else offset.add_to(merged, start, out)).to(dtype)


def fingerprint_of(merged: Checkpoint, digests: Mapping[str, bytes]) -> str:
    """The fingerprint of a checkpoint whose tensors' digests are known."""
    return fingerprint({name: (info.dtype, info.shape, digests[name]) for name, info in merged.tensors.items()})


def read_files(paths: Mapping[str, Path]) -> dict[str, bytes]:
    """Contents by name."""
    return {name: path.read_bytes() for name, path in sorted(paths.items())}


def known(files: Sequence[Mapping[str, bytes]]) -> dict[str, bytes]:
    """Contents by SHA-256."""
    return {hashlib.sha256(data).hexdigest(): data for group in files for data in group.values()}
