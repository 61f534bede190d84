"""What proves which bytes went in: SHA-256 of tensors, and of whole models however they are stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from retex_cli.io.checkpoint import Checkpoint
from retex_cli.io.digests import recall, remember
from retex_cli.io.dtypes import CODES, type_name
from retex_cli.io.tensors import byte_view

TensorHash = tuple[torch.dtype, tuple[int, ...], bytes]

_CHUNK_BYTES = 1 << 22
_TENSORS = ".tensors"


class TensorDigest:
    """SHA-256 of one tensor's stored bytes, fed in order in any chunking."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, data: torch.Tensor) -> None:
        """The next elements, on the CPU, in the stored element type."""
        self._hash.update(byte_view(data))

    def digest(self) -> bytes:
        """The 32 bytes of the hash of everything so far."""
        return self._hash.digest()


def tensor_digest(tensor: torch.Tensor) -> bytes:
    """SHA-256 (32 bytes) of a CPU tensor's data in row-major order; shape and type are not part of it."""
    return hashlib.sha256(byte_view(tensor)).digest()


def fingerprint(tensors: Mapping[str, TensorHash]) -> str:
    """Hexadecimal SHA-256 over the sorted list of (name, type, shape, SHA-256 of the data).

    The same model has the same fingerprint whatever its sharding and the order of its files.
    """
    total = hashlib.sha256()
    for name in sorted(tensors):
        dtype, shape, digest = tensors[name]
        row = [name, CODES.get(dtype, type_name(dtype)), list(shape), digest.hex()]
        total.update(json.dumps(row, separators=(",", ":")).encode() + b"\n")
    return total.hexdigest()


def checkpoint_digests(
    checkpoint: Checkpoint, threads: int = 1, found: Mapping[str, bytes] | None = None
) -> dict[str, bytes]:
    """SHA-256 of every tensor of a checkpoint, a few MB of each in memory at a time.

    Tensors of ``found`` have been hashed since the checkpoint was opened; those of files that have not changed since
    they were last hashed are remembered. Neither are read.
    """
    digests = {**known_digests(checkpoint), **(found or {})}
    left = [name for name in checkpoint.tensors if name not in digests]
    with ThreadPoolExecutor(max(1, threads)) as pool:
        digests |= zip(left, pool.map(lambda name: _digest(checkpoint, name), left), strict=True)
    if left or found:
        _remember(checkpoint, digests)
    return digests


def known_digests(checkpoint: Checkpoint) -> dict[str, bytes]:
    """SHA-256 of the tensors of those files that have not changed since they were hashed: maybe of none."""
    found = {}
    for file in checkpoint.weight_files():
        stat = file.unchanged()
        digests = recall(stat, _TENSORS, len(file.tensors)) if stat else None
        if digests is not None:
            found.update({name: bytes.fromhex(digest) for name, digest in zip(file.tensors, digests, strict=True)})
    return found


def _remember(checkpoint: Checkpoint, digests: Mapping[str, bytes]) -> None:
    for file in checkpoint.weight_files():
        stat = file.unchanged()
        if stat:
            remember(stat, _TENSORS, [digests[name].hex() for name in file.tensors])


def checkpoint_fingerprint(checkpoint: Checkpoint, threads: int = 1) -> str:
    """``fingerprint`` of an opened checkpoint; reads all of it once."""
    digests = checkpoint_digests(checkpoint, threads)
    return fingerprint({name: (info.dtype, info.shape, digests[name]) for name, info in checkpoint.tensors.items()})


def _digest(checkpoint: Checkpoint, name: str) -> bytes:
    info = checkpoint.tensors[name]
    step = max(1, _CHUNK_BYTES // info.dtype.itemsize)
    buffer = torch.empty(min(step, info.numel), dtype=info.dtype)
    digest = TensorDigest()
    for start in range(0, info.numel, step):
        chunk = buffer[: min(step, info.numel - start)]
        checkpoint.read_into(name, start, chunk)
        digest.update(chunk)
    return digest.digest()
