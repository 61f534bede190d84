"""The offsets artefact: for every task what turns the merged checkpoint back into its expert.

Tensors of the file: ``offsets/TASK`` the coded offsets (bytes), ``tensors/TASK/NAME`` task tensors verbatim,
``rows/TASK/NAME`` the rows that the expert has beyond the merged checkpoint's, ``files/SHA256`` side files that the
merged folder does not have, ``digests`` the start of the SHA-256 of every merged tensor. The header holds the rest;
``docs/format.md`` is its contract.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor

from retex_cli.errors import RetexError, UsageError
from retex_cli.io.align import Alignment
from retex_cli.io.artefact import open_artefact
from retex_cli.io.checkpoint import Checkpoint
from retex_cli.io.dtypes import CODES, DTYPES
from retex_cli.io.writer import TensorSpec
from retex_cli.offsets.coder import CorruptOffsets
from retex_cli.offsets.domain import from_domain, to_domain
from retex_cli.offsets.predict import Embedding, Predictor
from retex_cli.offsets.stream import Factors, Shape, decode

FORMAT = "retex.offsets"
VERSION = 1

Layout = list[tuple[str, Shape]]


def layout_of(merged: Checkpoint) -> Layout:
    """Name and shape of every tensor that can have an offset: the floating-point ones, by name."""
    return [(name, info.shape) for name, info in sorted(merged.tensors.items()) if info.dtype.is_floating_point]


@dataclass(frozen=True)
class TaskRecord:
    """What the header says of one task.

    ``names``: merged name -> expert name where swapping ``prefix`` does not give it. ``absent``: merged tensors that
    the expert does not have. ``dtype``: the expert's usual element type, ``dtypes`` the exceptions by expert name.
    ``rows``: merged name -> rows in common, where the expert has more. ``files``: side file -> SHA-256.
    ``fingerprint`` is the expert's, ``checksum`` the SHA-256 of the coded offsets.
    """

    expert: str
    revision: str | None
    fingerprint: str
    expert_bytes: int
    offset_bytes: int
    budget_bytes: int
    checksum: str
    prefix: tuple[str, str]
    names: Mapping[str, str]
    absent: tuple[str, ...]
    dtype: str
    dtypes: Mapping[str, str]
    rows: Mapping[str, int]
    files: Mapping[str, str]

    @classmethod
    def from_json(cls, value: Mapping[str, object]) -> TaskRecord:
        fields = dict(value)
        fields["prefix"] = tuple(fields["prefix"])  # type: ignore[arg-type]
        fields["absent"] = tuple(fields["absent"])  # type: ignore[arg-type]
        return cls(**fields)  # type: ignore[arg-type]

    def expert_name(self, merged_name: str) -> str:
        """What the expert calls a merged tensor."""
        if merged_name in self.names:
            return self.names[merged_name]
        return self.prefix[1] + merged_name.removeprefix(self.prefix[0])

    def expert_dtype(self, expert_name: str) -> torch.dtype:
        return DTYPES[self.dtypes.get(expert_name, self.dtype)]


def naming(alignment: Alignment) -> dict[str, str]:
    """The names that swapping the prefix does not give."""
    ours, theirs = alignment.prefix
    return {name: expert for name, expert in alignment.shared.items() if theirs + name.removeprefix(ours) != expert}


def usual_dtype(dtypes: Mapping[str, torch.dtype]) -> tuple[str, dict[str, str]]:
    """The most frequent element type, and the exceptions by name."""
    codes = {name: CODES[dtype] for name, dtype in dtypes.items()}
    usual = max(sorted(set(codes.values())), key=list(codes.values()).count)
    return usual, {name: code for name, code in sorted(codes.items()) if code != usual}


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
        self._file = open_artefact(path, format=FORMAT, versions={VERSION})
        try:
            header = json.loads(self._file.metadata["tasks"])
            self.tasks = {task: TaskRecord.from_json(header[task]) for task in sorted(header)}
            self.fingerprint = self._file.metadata["merged"]
        except (KeyError, TypeError, ValueError) as error:
            raise RetexError(f"{path}: damaged header: {error}", "fit the offsets again") from error
        self._check_layout()

    def _check_layout(self) -> None:
        names = sorted(self.merged.tensors)
        count = self._file.tensors["digests"].shape[0]
        if count != len(names):
            raise RetexError(
                f"{self.path}: belongs to another merged checkpoint: it has {count} tensors, "
                f"{self.merged.reference} has {len(names)}",
                "give the merged checkpoint that the offsets were fitted to, or fit them again",
            )

    def check_merged(self, digests: Mapping[str, bytes]) -> None:
        """RetexError unless ``digests`` (SHA-256 of every merged tensor) are those the offsets were fitted to."""
        stored = self._file.read("digests")
        for name, row in zip(sorted(self.merged.tensors), stored, strict=True):
            expected = bytes(row.tolist())
            if digests[name][: len(expected)] != expected:
                raise RetexError(
                    f"{self.path}: belongs to another merged checkpoint: tensor {name!r} had SHA-256 "
                    f"{expected.hex()}…, in {self.merged.reference} it has {digests[name][: len(expected)].hex()}…",
                    "give the merged checkpoint that the offsets were fitted to, or fit them again",
                )

    def task(self, name: str) -> TaskRecord:
        """UsageError, with the closest names, for a task that the file does not have."""
        if name in self.tasks:
            return self.tasks[name]
        close = get_close_matches(name, self.tasks, 3, 0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(self.tasks)}"
        raise UsageError(f"{self.path}: no task {name!r}", hint)

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

    def factors(self, task: str) -> dict[str, Factors]:
        """Decoded offsets of one task by merged name. RetexError where its bytes are damaged; others still decode."""
        record = self.task(task)
        data = self._file.read(f"offsets/{task}").numpy().tobytes()
        try:
            if hashlib.sha256(data).hexdigest() != record.checksum:
                raise CorruptOffsets("its SHA-256 is not the one in the header")
            return decode(data, layout_of(self.merged))
        except CorruptOffsets as error:
            raise RetexError(
                f"{self.path}: the offsets of task {task!r} are damaged: {error}",
                "other tasks can still be recovered; get the file again for this one",
            ) from error

    def rows(self, task: str, merged_name: str) -> int:
        """How many rows the expert of ``task`` has beyond the merged tensor's; 0 for most."""
        record = self.task(task)
        if merged_name not in record.rows:
            return 0
        return self._file.tensors[f"rows/{task}/{record.expert_name(merged_name)}"].shape[0]

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
        for name, info in self._file.tensors.items():
            if name.startswith(start):
                parts.append(Part(TensorSpec(name.removeprefix(start), info.dtype, info.shape), None))
        return sorted(parts, key=lambda part: part.spec.name)

    def make(
        self,
        part: Part,
        merged: Tensor | None,
        predictor: Predictor,
        embedding: Embedding,
        head: str,
        device: torch.device,
        out: Tensor | None = None,
    ) -> Tensor:
        """The data of one part; ``merged`` is the merged tensor it is made from. Sums are in float32, on ``device``.

        What has no offset stays on the device where it is. ``out``, contiguous float32 of the merged tensor's shape on
        ``device``, is memory to do sums in; what is returned may be that.
        """
        spec = part.spec
        if part.merged is None or merged is None:
            return self._file.read(f"tensors/{head}/{spec.name}")
        delta = predictor.delta(part.merged, tuple(merged.shape), embedding, device, out)
        name = part.merged
        # into the offset's own memory: a third tensor of this size would cost more than the sum
        value = merged if delta is None else from_domain(name, delta.add_(to_domain(name, merged.to(device))))
        value = value.to(spec.dtype)
        if merged.shape != spec.shape:
            value = torch.cat([value, self._file.read(f"rows/{head}/{spec.name}").to(value.device)])
        return value

    def side_files(self, task: str) -> dict[str, bytes]:
        """Config, tokenizer and other files of a task's expert. RetexError names one that is nowhere to be found."""
        ours = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in self.merged.side_files().values()}
        found = {}
        for name, digest in self.task(task).files.items():
            if f"files/{digest}" in self._file.tensors:
                found[name] = self._file.read(f"files/{digest}").numpy().tobytes()
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
        self._file.close()


def tasks_json(records: Mapping[str, TaskRecord]) -> str:
    """The header entry ``tasks``."""
    return json.dumps({task: asdict(records[task]) for task in sorted(records)}, separators=(",", ":"))


def digest_rows(digests: Mapping[str, bytes]) -> Tensor:
    """uint8 [tensors, 8]: the start of each digest, enough to name the tensor that differs."""
    return torch.tensor([list(digests[name][:8]) for name in sorted(digests)], dtype=torch.uint8).reshape(-1, 8)


def read_files(paths: Mapping[str, Path]) -> dict[str, bytes]:
    """Contents by name."""
    return {name: path.read_bytes() for name, path in sorted(paths.items())}


def known(files: Sequence[Mapping[str, bytes]]) -> dict[str, bytes]:
    """Contents by SHA-256."""
    return {hashlib.sha256(data).hexdigest(): data for group in files for data in group.values()}
