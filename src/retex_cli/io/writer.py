"""Checkpoints out: headers first, tensor memory straight to the file, nothing visible until everything is there.

A file or folder is written under a temporary name beside its target, flushed to the disk and renamed; any exception
removes the temporary and leaves the old output as it was. Modes are what the umask says.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from retex_cli.errors import RetexError
from retex_cli.io.layout import Shard, TensorSpec, encode_index, plan_shards
from retex_cli.io.output import Output, write_error
from retex_cli.io.replace import put_in_place, sync_folder, temporary_beside, write_new
from retex_cli.io.sinks import Files, Sink, Stream, standard_output
from retex_cli.io.tensors import byte_view

__all__ = ["Output", "TensorSpec", "Writer", "open_output"]

INDEX = "model.safetensors.index.json"

#: Written after everything else: a reader that finds them finds the rest.
_LAST = ("README.md", "generation_config.json", "config.json", INDEX)


@dataclass(frozen=True)
class Claim:
    """Where some elements go: (file, position in it, bytes) of each stretch, in order."""

    dtype: torch.dtype
    stretches: Sequence[tuple[int, int, int]]


class Writer:
    """Takes the tensors' data in the order of the specs, in chunks of any size.

    Whoever makes them out of order claims places in order, and fills them when they are made: side by side, unless
    the output is ``in_order``, where claims are filled one by one as they were made.
    """

    def __init__(self, place: object, shards: Sequence[Shard], specs: Sequence[TensorSpec], sink: Sink) -> None:
        self.bytes_written = 0
        self.in_order = sink.in_order
        self.total_bytes = sum(spec.nbytes for spec in specs)
        self.side_files: dict[str, bytes | Path] = {}
        self._place = place
        self._specs = specs
        self._sink = sink
        self._home = {name: (k, start) for k, shard in enumerate(shards) for name, start in shard.starts.items()}
        self._next = 0
        self._done = 0
        self._skip_empty()

    def write(self, data: torch.Tensor) -> None:
        """The next elements, flat, on the CPU, in the spec's element type. ValueError for too many or another type."""
        self.fill(self.claim(data.numel(), data.dtype), data)

    def claim(self, numel: int, dtype: torch.dtype) -> Claim:
        """The place of the next ``numel`` elements. ValueError for too many, and where they have another type."""
        left, stretches = numel * dtype.itemsize, []
        while left:
            if self._next == len(self._specs):
                raise ValueError(f"{left} bytes more than the tensors of the header hold")
            spec = self._specs[self._next]
            if dtype != spec.dtype:
                raise ValueError(f"tensor {spec.name!r} is announced as {spec.dtype}, the data is {dtype}")
            count = min(left, spec.nbytes - self._done)
            shard, start = self._home[spec.name]
            stretches.append((shard, start + self._done, count))
            left -= count
            self._done += count
            if self._done == spec.nbytes:
                self._next, self._done = self._next + 1, 0
                self._skip_empty()
        return Claim(dtype, stretches)

    def fill(self, claim: Claim, data: torch.Tensor) -> None:
        """Write what a place was claimed for: flat, on the CPU. ValueError for anything else."""
        view, at = byte_view(data), 0
        if data.dtype != claim.dtype or len(view) != sum(count for *_, count in claim.stretches):
            raise ValueError(f"{data.numel()} elements of {data.dtype} are not what the place was claimed for")
        for shard, position, count in claim.stretches:
            with self.in_words():
                self._sink.put(shard, position, view[at : at + count])
            at += count
            self.bytes_written += count

    def patch(self, placeholder: str, text: str) -> None:
        """Replace a placeholder in the header of every file by an equally long text, for what is known late.

        ValueError unless both are plain ASCII of one length and the placeholder is in each header exactly once, and
        for standard output, where the header has already gone.
        """
        if len(placeholder) != len(text) or not (placeholder + text).isascii() or set('"\\') & set(placeholder + text):
            raise ValueError(f"cannot patch {placeholder!r} with {text!r}: both must be plain ASCII of one length")
        with self.in_words():
            self._sink.patch(placeholder.encode(), text.encode())

    def side_file(self, name: str, content: bytes) -> None:
        """Add or replace a side file of a folder, for what is known only after the weights were read."""
        self.side_files[name] = content

    def finish(self) -> None:
        """ValueError, naming the tensor, unless every announced byte has come."""
        if self._next < len(self._specs):
            spec = self._specs[self._next]
            raise ValueError(f"tensor {spec.name!r} got {self._done} of {spec.nbytes} bytes")

    @contextlib.contextmanager
    def in_words(self) -> Iterator[None]:
        """Turns what the system says about a write into a RetexError that names the output and how far it came."""
        try:
            yield
        except OSError as error:
            raise write_error(self._place, error, self.bytes_written, self.total_bytes) from error

    def _skip_empty(self) -> None:
        while self._next < len(self._specs) and self._specs[self._next].nbytes == 0:
            self._next += 1


@contextlib.contextmanager
def _to_stream(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> Iterator[Writer]:
    shard = plan_shards(specs, metadata, max_shard_size=sys.maxsize)[0]
    stream = standard_output()
    starts = [shard.starts[spec.name] for spec in specs]
    sink = Stream(stream)
    writer = Writer("standard output", [shard], specs, sink)
    if starts != sorted(starts):  # aligning the data reorders it, and a pipe cannot be sought: go through a file
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            with _to_disk(Output("file", path), specs, metadata, sys.maxsize, {}) as spooled:
                yield spooled
            with writer.in_words(), path.open("rb") as spool:
                while chunk := spool.read(1 << 20):
                    sink.put(0, 0, memoryview(chunk))
                stream.flush()
        return
    with writer.in_words():
        sink.put(0, 0, memoryview(shard.header))
    yield writer
    writer.finish()
    with writer.in_words():
        stream.flush()


@contextlib.contextmanager
def _to_disk(
    output: Output, specs: Sequence[TensorSpec], metadata: Mapping[str, str], max_shard_size: int,
    side_files: Mapping[str, bytes | Path],
) -> Iterator[Writer]:  # fmt: skip
    shards = plan_shards(specs, metadata, max_shard_size)
    with contextlib.ExitStack() as stack:
        try:
            temporary = stack.enter_context(temporary_beside(output.target))
            if output.kind == "folder":
                temporary.mkdir()
        except OSError as error:
            raise write_error(output, error, 0, sum(spec.nbytes for spec in specs)) from error
        paths = [temporary / shard.file for shard in shards] if output.kind == "folder" else [temporary]
        files = Files(paths, shards)
        writer = Writer(output, shards, specs, files)
        writer.side_files.update(side_files)
        with contextlib.closing(files):
            yield writer
            writer.finish()
            with writer.in_words():
                files.flush()
        with writer.in_words():
            if output.kind == "folder":
                if len(shards) > 1:
                    writer.side_file(INDEX, encode_index(shards, specs))
                _place_side_files(temporary, writer.side_files)
            put_in_place(temporary, output.target)


def _place_side_files(folder: Path, files: Mapping[str, bytes | Path]) -> None:
    """Write or copy the side files, config and index last."""
    for name in sorted(files, key=lambda name: (_LAST.index(name) if name in _LAST else -1, name)):
        path, content = folder / name, files[name]
        if folder not in Path(os.path.normpath(path)).parents:
            raise RetexError(f"{name}: a side file may not leave the model's folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_new(path, content.read_bytes() if isinstance(content, Path) else content)
    sync_folder(folder)


@contextlib.contextmanager
def open_output(
    output: Output,
    specs: Sequence[TensorSpec],
    *,
    metadata: Mapping[str, str],
    overwrite: bool = False,
    max_shard_size: int = 5_000_000_000,
    side_files: Mapping[str, bytes | Path] | None = None,
) -> Iterator[Writer]:
    """Write tensors in the order of ``specs``; the output appears, whole, when the block ends without an exception.

    ``metadata`` goes into the header of every file (``format: pt`` is added where it does not say otherwise).
    ``side_files`` (relative name -> bytes, or a file to copy) and ``max_shard_size`` in bytes matter to folders only.
    RetexError for an output that exists (without ``overwrite``), for a full disk and for whatever else the system
    refuses; ValueError when the data does not match the specs.
    """
    if output.kind == "stdout":
        with _to_stream(specs, metadata) as writer:
            yield writer
        return
    output.check(overwrite, nbytes=sum(spec.nbytes for spec in specs))
    limit = max_shard_size if output.kind == "folder" else sys.maxsize
    with _to_disk(output, specs, metadata, limit, side_files or {}) as writer:
        yield writer
