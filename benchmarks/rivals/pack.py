"""The files of the rivals: half-precision numbers as they are, symbols entropy-coded with a table each.

Names and shapes are the merged checkpoint's and cost nothing, as in retex's own files.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import constriction
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_TABLE_TOTAL = 65535
_Categorical = constriction.stream.model.Categorical
_Words = NDArray[np.uint32]


class Pack:
    """Parts of a file in the order in which ``Unpack`` is asked for them."""

    def __init__(self) -> None:
        self._raw = bytearray()
        self._jobs: list[tuple[NDArray[np.int32], object]] = []

    def halves(self, values: Tensor) -> None:
        """Any shape, as float16. ValueError where a number is too large for that."""
        half = values.detach().to(torch.float16).contiguous()
        if not bool(half.isfinite().all()):
            raise ValueError("a value is beyond float16")
        self._raw += half.numpy().tobytes()

    def singles(self, *values: float) -> None:
        """Numbers as float32."""
        self._raw += struct.pack(f"<{len(values)}f", *values)

    def shorts(self, values: Sequence[int]) -> None:
        """Whole numbers from 0 to 65535, two bytes each."""
        self._raw += struct.pack(f"<{len(values)}H", *values)

    def symbols(self, values: Tensor) -> None:
        """Whole numbers or truth values, any shape: a table of their frequencies here, the symbols at the end."""
        flat = values.reshape(-1).to(torch.int32).numpy()
        table = _table(flat)
        self.shorts([len(table)])
        if len(table) > 1:
            self.shorts(table.tolist())
            self._jobs.append((flat, _model(table)))

    def data(self) -> bytes:
        """The whole file."""
        coder = constriction.stream.stack.AnsCoder()
        for symbols, model in reversed(self._jobs):  # a stack: what is decoded first goes in last
            coder.encode_reverse(symbols, model)
        words: _Words = coder.get_compressed()
        return struct.pack("<Q", len(self._raw)) + bytes(self._raw) + words.astype("<u4").tobytes()


class Unpack:
    """What ``Pack`` was given, asked for by shape, in the same order."""

    def __init__(self, data: bytes) -> None:
        (length,) = struct.unpack_from("<Q", data)
        self._raw, self._at = data[8 : 8 + length], 0
        self._coder = constriction.stream.stack.AnsCoder(np.frombuffer(data[8 + length :], "<u4").astype(np.uint32))

    def _take(self, code: str, count: int) -> tuple[float, ...]:
        found = struct.unpack_from(f"<{count}{code}", self._raw, self._at)
        self._at += struct.calcsize(f"<{count}{code}")
        return found

    def halves(self, *shape: int) -> Tensor:
        """float32 of this shape."""
        count = int(np.prod(shape))
        found = np.frombuffer(self._raw, "<f2", count, self._at)
        self._at += 2 * count
        return torch.from_numpy(found.astype(np.float32)).reshape(shape)

    def singles(self, count: int) -> tuple[float, ...]:
        """Float32 numbers."""
        return self._take("f", count)

    def shorts(self, count: int) -> list[int]:
        """Whole numbers from 0 to 65535."""
        return [int(value) for value in self._take("H", count)]

    def symbols(self, *shape: int) -> Tensor:
        """int32 of this shape."""
        (size,) = self.shorts(1)
        count = int(np.prod(shape))
        if size < 2 or not count:
            return torch.zeros(shape, dtype=torch.int32)
        table = np.array(self.shorts(size), dtype=np.int64)
        return torch.from_numpy(self._coder.decode(_model(table), count).astype(np.int32)).reshape(shape)


def _table(symbols: NDArray[np.int32]) -> NDArray[np.int64]:
    """Frequencies that fit into two bytes; a symbol that occurs keeps at least one."""
    counts = np.bincount(symbols)
    if counts.sum() <= _TABLE_TOTAL:
        return counts
    scaled = np.rint(counts * (_TABLE_TOTAL / counts.sum())).astype(np.int64)
    return np.where(counts > 0, np.maximum(scaled, 1), 0)


def _model(table: NDArray[np.int64]) -> object:
    return _Categorical(table.astype(np.float64) / table.sum(), perfect=False)
