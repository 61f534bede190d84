"""What is known of a stored tensor before its data is read, and the contract of a file that holds some."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

#: Bytes that a converting read stages at once: small enough to stay in a core's cache, large enough to hide the call.
SCRATCH_BYTES = 1 << 19

_local = threading.local()


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One stored tensor: its name, element type, shape and the file that holds it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar, 0 when any dimension is 0."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.numel * self.dtype.itemsize


class TensorFile(Protocol):
    """One file of tensors, opened by its header; reads are positioned and safe from several threads."""

    @property
    def path(self) -> Path:
        """Where the file is, or where it will be once it is downloaded."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors in the order of their data."""

    @property
    def aliases(self) -> Mapping[str, str]:
        """Names that share the data of a kept name: dropped name -> kept name."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """Free text of the header."""

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor in memory of its own, as stored."""

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Elements ``[start, start + out.numel())`` of the flattened tensor, converted to ``out.dtype``."""

    def unchanged(self) -> os.stat_result | None:
        """What the system says of a file that is as it was when it was opened; None where that cannot be told."""

    def close(self) -> None:
        """Give back the file; further reads fail."""


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as writable bytes, without a copy."""
    flat = tensor.detach().reshape(-1)
    if flat.numel() < 2:
        flat = flat.as_strided(flat.shape, (1,))  # with so few elements any stride, even 0, passes for contiguous
    return flat.view(torch.uint8).numpy().data


def scratch() -> torch.Tensor:
    """``SCRATCH_BYTES`` bytes that belong to the calling thread; the next call in the thread returns the same ones."""
    buffer: torch.Tensor | None = getattr(_local, "scratch", None)
    if buffer is None:
        buffer = torch.empty(SCRATCH_BYTES, dtype=torch.uint8)
        _local.scratch = buffer
    return buffer


def check_request(info: TensorInfo, start: int, out: torch.Tensor) -> None:
    """ValueError unless ``out`` is flat CPU memory and the range lies inside the tensor: a bug of the caller."""
    if out.dim() != 1 or not out.is_contiguous() or out.device.type != "cpu":
        raise ValueError(f"{info.name}: read_into needs a 1-D contiguous CPU tensor")
    if start < 0 or start + out.numel() > info.numel:
        raise ValueError(f"{info.name}: elements {start} to {start + out.numel()} of {info.numel}")
