"""Where every tensor goes before any is written: headers, shards and the index as values."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import torch

from retex_cli.io.dtypes import CODES


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written: name, element type, shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One file to be: its name, its header with the length in front, where each tensor's data starts in the file."""

    file: str
    header: bytes
    starts: Mapping[str, int]
    size: int


def is_aligned(specs: Sequence[TensorSpec]) -> bool:
    """Whether every tensor, written in this order, starts at a multiple of its element size, as readers expect."""
    at = 0
    for spec in specs:
        if at % spec.dtype.itemsize:
            return False
        at += spec.nbytes
    return True


def encode_header(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """Length and JSON of a safetensors header, padded to 8 bytes, and the start of each tensor within the data.

    Data goes in the given order unless that would misalign a tensor; then wide element types go first, which is the
    order that safetensors itself writes.
    """
    order = specs if is_aligned(specs) else sorted(specs, key=lambda spec: -spec.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    starts, at = {}, 0
    for spec in order:
        starts[spec.name] = at
        header[spec.name] = {
            "dtype": CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [at, at + spec.nbytes],
        }
        at += spec.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, starts


def make_shard(file: str, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> Shard:
    """The layout of one file."""
    header, starts = encode_header(specs, metadata)
    size = len(header) + sum(spec.nbytes for spec in specs)
    return Shard(file, header, {name: len(header) + at for name, at in starts.items()}, size)


def plan_shards(
    specs: Sequence[TensorSpec], metadata: Mapping[str, str], max_shard_size: int, name: str = "model.safetensors"
) -> list[Shard]:
    """One file if the data fits into ``max_shard_size`` bytes, else numbered shards in the given order.

    A tensor larger than the limit gets a shard of its own. ValueError for repeated names.
    """
    if len({spec.name for spec in specs}) != len(specs):
        raise ValueError("two tensors to be written have the same name")
    groups: list[list[TensorSpec]] = [[]]
    used = 0
    for spec in specs:
        if groups[-1] and used + spec.nbytes > max_shard_size:
            groups.append([])
            used = 0
        groups[-1].append(spec)
        used += spec.nbytes
    if len(groups) == 1:
        return [make_shard(name, specs, metadata)]
    stem = PurePosixPath(name).stem
    return [
        make_shard(f"{stem}-{k:05d}-of-{len(groups):05d}.safetensors", group, metadata)
        for k, group in enumerate(groups, 1)
    ]


def encode_index(shards: Sequence[Shard], specs: Sequence[TensorSpec]) -> bytes:
    """``model.safetensors.index.json``: which shard holds which tensor, and the bytes of all data."""
    home = {name: shard.file for shard in shards for name in shard.starts}
    index = {
        "metadata": {"total_size": sum(spec.nbytes for spec in specs)},
        "weight_map": {spec.name: home[spec.name] for spec in specs},
    }
    return (json.dumps(index, ensure_ascii=False, indent=2) + "\n").encode()
