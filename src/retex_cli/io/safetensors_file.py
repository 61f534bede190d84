"""One safetensors file: the header checked byte by byte before it is believed, the data by positioned reads.

Format: 8 bytes little-endian header length, a JSON object, then the data without gaps
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from retex_cli.errors import RetexError
from retex_cli.io.digests import key
from retex_cli.io.dtypes import DTYPES
from retex_cli.io.tensors import TensorInfo, byte_view, check_request, scratch

#: The format's own limit; a longer header is damage or an attack on memory.
MAX_HEADER_BYTES = 100_000_000

_AGAIN = "download or export the file again"

Span = tuple[int, int]


def header_length(path: Path, first: bytes, file_size: int) -> int:
    """Length of the JSON header in bytes, from the first eight bytes of the file and the size of the whole."""
    if len(first) < 8:
        raise RetexError(f"{path}: truncated safetensors file: {file_size} bytes, the header alone needs 8", _AGAIN)
    length = int(struct.unpack("<Q", first[:8])[0])
    if length > MAX_HEADER_BYTES:
        raise RetexError(
            f"{path}: oversized safetensors header: it claims {length:,} bytes, the format allows {MAX_HEADER_BYTES:,}",
            "this is not a safetensors file, or it is damaged",
        )
    if length > file_size - 8:
        raise RetexError(
            f"{path}: truncated safetensors file: the header claims {length:,} bytes, the file has {file_size:,}",
            _AGAIN,
        )
    return length


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
    return found


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _entry(path: Path, name: str, entry: object) -> tuple[TensorInfo, Span]:
    """One tensor of the header, believed only when type, shape and span agree."""
    if not isinstance(entry, dict):
        raise RetexError(f"{path}: damaged header: the entry of tensor {name!r} is not an object", _AGAIN)
    code, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(code, str) or code not in DTYPES:
        raise RetexError(
            f"{path}: tensor {name!r} has the unknown dtype {code!r}", f"known are {', '.join(sorted(DTYPES))}"
        )
    if not isinstance(shape, list) or not all(_is_count(size) for size in shape):
        raise RetexError(f"{path}: damaged header: tensor {name!r} has the shape {shape!r}", _AGAIN)
    if not isinstance(span, list) or len(span) != 2 or not all(_is_count(at) for at in span) or span[0] > span[1]:
        raise RetexError(f"{path}: damaged header: tensor {name!r} has the data_offsets {span!r}", _AGAIN)
    info = TensorInfo(name, DTYPES[code], tuple(shape), path)
    if span[1] - span[0] != info.nbytes:
        raise RetexError(
            f"{path}: tensor {name!r} has {span[1] - span[0]:,} bytes, "
            f"its shape {list(shape)} in {code} needs {info.nbytes:,}",
            _AGAIN,
        )
    return info, (span[0], span[1])


def _check_layout(path: Path, entries: list[tuple[TensorInfo, Span]], data_bytes: int) -> None:
    """The spans, in order, must tile the data: no overlap, no gap, nothing behind the last."""
    end, before = 0, "the header"
    for info, (start, stop) in entries:
        if start < end:
            raise RetexError(
                f"{path}: overlapping tensors: {info.name!r} starts at byte {start:,}, {before} ends at {end:,}", _AGAIN
            )
        if start > end:
            raise RetexError(
                f"{path}: damaged header: {start - end:,} bytes between {before} and {info.name!r} belong to no tensor",
                _AGAIN,
            )
        end, before = stop, repr(info.name)
    if end > data_bytes:
        first = next(info.name for info, (_, stop) in entries if stop > data_bytes)
        raise RetexError(
            f"{path}: truncated safetensors file: tensor {first!r} is cut off, "
            f"the data should have {end:,} bytes and has {data_bytes:,}",
            _AGAIN,
        )
    if end < data_bytes:
        raise RetexError(f"{path}: {data_bytes - end:,} bytes after the last tensor belong to no tensor", _AGAIN)


def parse_header(
    path: Path, header: bytes, data_bytes: int
) -> tuple[dict[str, TensorInfo], dict[str, Span], dict[str, str]]:
    """Tensors in data order, their byte spans within the data, and the metadata. RetexError names file and tensor."""
    try:
        parsed = json.loads(header, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise RetexError(f"{path}: damaged safetensors header: {error}", _AGAIN) from None
    if not isinstance(parsed, dict):
        raise RetexError(f"{path}: damaged safetensors header: it is not a JSON object", _AGAIN)
    metadata = parsed.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise RetexError(f"{path}: damaged safetensors header: __metadata__ may hold text only", _AGAIN)
    entries = sorted((_entry(path, name, entry) for name, entry in parsed.items()), key=lambda pair: pair[1])
    _check_layout(path, entries, data_bytes)
    return {i.name: i for i, _ in entries}, {i.name: span for i, span in entries}, metadata


def tied_by_metadata(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> dict[str, str]:
    """``safetensors.torch.save_model`` notes a dropped tied tensor as ``dropped: kept`` in the metadata."""
    return {dropped: kept for dropped, kept in metadata.items() if dropped not in tensors and kept in tensors}


class SafetensorsFile:
    """A safetensors file opened by its header. Each read goes where it is wanted; nothing else is in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise RetexError(f"{path}: cannot be read: {error.strerror}") from None
        try:
            self._opened = os.fstat(self._fd)
            size = self._opened.st_size
            length = header_length(path, os.pread(self._fd, 8, 0), size)
            self._data = 8 + length
            parsed = parse_header(path, os.pread(self._fd, length, 8), size - self._data)
        except OSError as error:
            os.close(self._fd)
            raise RetexError(f"{path}: cannot be read: {error.strerror}") from None
        except BaseException:
            os.close(self._fd)
            raise
        tensors, self._spans, metadata = parsed
        self._map: mmap.mmap | None = None
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        self.metadata: Mapping[str, str] = MappingProxyType(metadata)
        self.aliases: Mapping[str, str] = MappingProxyType(tied_by_metadata(tensors, metadata))

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor in memory of its own, stored type and shape."""
        info = self.tensors[name]
        out = torch.empty(info.shape, dtype=info.dtype)
        self._fill(name, self._spans[name][0], byte_view(out))
        return out

    def mapped(self, name: str) -> torch.Tensor:
        """The whole tensor where it lies in the file: it takes no memory of the process until it is written to, and
        stays readable when the file is closed or removed. For files that nobody changes meanwhile."""
        info, (start, stop) = self.tensors[name], self._spans[name]
        if start == stop:
            return torch.empty(info.shape, dtype=info.dtype)
        if self._map is None:
            self._map = mmap.mmap(self._fd, 0, access=mmap.ACCESS_COPY)
        data = torch.frombuffer(self._map, dtype=info.dtype, count=info.numel, offset=self._data + start)
        return data.reshape(info.shape)

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Elements ``[start, start + out.numel())`` of the flattened tensor, converted to ``out.dtype``.

        The same type is one read straight into ``out``; another goes through the thread's scratch memory.
        """
        info = self.tensors[name]
        check_request(info, start, out)
        offset = self._spans[name][0] + start * info.dtype.itemsize
        if info.dtype == out.dtype:
            self._fill(name, offset, byte_view(out))
            return
        buffer = scratch()
        step = buffer.numel() // info.dtype.itemsize
        for at in range(0, out.numel(), step):
            count = min(step, out.numel() - at)
            staged = buffer[: count * info.dtype.itemsize]
            self._fill(name, offset + at * info.dtype.itemsize, byte_view(staged))
            out[at : at + count].copy_(staged.view(info.dtype))

    def _fill(self, name: str, offset: int, view: memoryview) -> None:
        done, wanted = 0, len(view)
        while done < wanted:
            try:
                got = os.preadv(self._fd, [view[done:]], self._data + offset + done)
            except OSError as error:
                raise RetexError(f"{self.path}: reading tensor {name!r} failed: {error.strerror}") from None
            if got == 0:
                raise RetexError(f"{self.path}: the file was cut short while tensor {name!r} was read", _AGAIN)
            done += got

    def unchanged(self) -> os.stat_result | None:
        """What the system says of the file if it is as it was when it was opened, else None."""
        now = os.fstat(self._fd)
        return now if key(now) == key(self._opened) else None

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
