"""The exact correction: what turns a prediction of an expert's tensor into the expert's very bits.

Both are seen as integers in the order of their values (``bits.Grid``). Their difference is small where the prediction
is good, and its spread is known beforehand: the error of a row and of a column, which are stored, over the distance of
neighbouring values at the predicted one, which grows with its exponent. Of each difference the bits far below that
spread are noise and stored as they are; the rest is entropy coded in contexts of equal expected spread. Entries that
are predicted within reach of zero, where exponents say nothing, are coded directly. Rows that equal the merged ones
cost nothing.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retex_cli.offsets import coder
from retex_cli.offsets.bits import TYPES, Grid, Integers, grid_of, magnitudes, pack, packed_bytes, unpack
from retex_cli.offsets.blocks import Span, row_blocks
from retex_cli.offsets.coder import CorruptOffsets
from retex_cli.offsets.fixed import Prediction
from retex_cli.offsets.scales import scale_codes
from retex_cli.offsets.total import Noise

__all__ = ["TYPES", "Correction", "OtherPrediction", "checked", "encode", "noise_of"]

EQUAL, PLAIN, OFFSET = range(3)
"""What a row is predicted by: it is the merged row; the merged row; the merged row and the offset."""
TOGETHER = 1 << 18
"""Entries that are coded together, in whole rows: a part of the format."""
FINE, COARSE, NEAR = 4, 20, 28
"""Contexts below FINE share the bits below the coded ones; below COARSE none are raw; below NEAR: close to zero."""
WINDOW = 64
"""Coded differences are at least minus this and less than this; what lies beyond is coded by its length."""
KEPT_MANTISSA = 2
"""Coded bits of the mantissa of an entry near zero."""
SPIKE = 0.01
"""Share of exact hits, among entries with raw bits, above which hits are coded first."""
_DIGEST, _CHECK = 8, 4
_READ = 1 << 20

Read = Callable[[int, int], bytes]


def encode(expert: Tensor, prediction: Prediction) -> bytes:
    """The correction of ``expert`` (any floating-point type, finite, any shape) over its ``prediction``."""
    data = bytearray()
    rows, columns = prediction.shape
    matrix = expert.reshape(rows, columns)
    for start, stop in row_blocks(rows, columns, TOGETHER):
        block = _encode_block(matrix[start:stop], prediction, start)
        data += len(block).to_bytes(4, "little") + block
    if len(data) >= expert.numel() * expert.dtype.itemsize:
        data = bytearray(_bytes(expert))
    return checked(_digest(expert) + bytes(data))


class OtherPrediction(ValueError):
    """The correction is whole, but the tensor it gives is not the expert's: the prediction must differ."""


class Correction:
    """The correction of a tensor of ``rows x columns`` (see ``Prediction``), applied block by block.

    ``blocks``: the rows that are restored together. They may be restored side by side; whoever puts them together has
    the whole checked, once.
    """

    def __init__(self, read: Read, size: int, rows: int, columns: int, dtype: torch.dtype) -> None:
        """``read(start, stop)`` gives bytes of it, of which there are ``size``. Raises ``CorruptOffsets``."""
        self._read, self._columns, self._dtype = read, columns, dtype
        head = read(0, min(size, _CHECK + _DIGEST))
        if len(head) < _CHECK + _DIGEST or _checksum(read, _CHECK, size) != head[:_CHECK]:
            raise CorruptOffsets("its checksum is not the one stored with it")
        self._digest = head[_CHECK:]
        self.blocks = row_blocks(rows, columns, TOGETHER)
        self._verbatim = size - len(head) == rows * columns * dtype.itemsize
        self._places = self._found(len(head), size)

    def _found(self, at: int, size: int) -> list[Span]:
        """Where the bytes of every block lie."""
        places = []
        for start, stop in self.blocks:
            length = (stop - start) * self._columns * self._dtype.itemsize
            if not self._verbatim:
                if at + 4 > size:
                    raise CorruptOffsets("its blocks do not fill it")
                length = int.from_bytes(self._read(at, at + 4), "little")
                at += 4
            places.append((at, at + length))
            at += length
        if at != size:
            raise CorruptOffsets("its blocks do not fill it")
        return places

    def restore(self, block: int, prediction: Prediction) -> Tensor:
        """The expert's rows of one block. Raises ``CorruptOffsets``."""
        (start, stop), data = self.blocks[block], self._read(*self._places[block])
        if self._verbatim:
            return torch.frombuffer(bytearray(data), dtype=self._dtype).reshape(stop - start, self._columns)
        return _decode_block(data, prediction, start, stop, self._dtype)

    def check(self, digest: bytes) -> None:
        """Raises ``OtherPrediction`` unless this is the SHA-256 of all rows of the expert's tensor."""
        found = digest[:_DIGEST]
        if found != self._digest:
            raise OtherPrediction(f"{found.hex()}… and not {self._digest.hex()}…")


def _checksum(read: Read, start: int, stop: int) -> bytes:
    value = 0
    for at in range(start, stop, _READ):
        value = zlib.crc32(read(at, min(at + _READ, stop)), value)
    return value.to_bytes(_CHECK, "little")


def checked(body: bytes) -> bytes:
    """``body`` behind its checksum: damage to the file is told from a prediction that differs."""
    return zlib.crc32(body).to_bytes(_CHECK, "little") + body


def noise_of(expert: Tensor, delta: Tensor) -> Noise:
    """How much of ``expert`` a correction has to describe, and how finely; ``delta`` is its offset, of any device."""
    grid = grid_of(expert)
    typical = float(expert.double().square().mean().sqrt()) if expert.numel() else 0.0
    step = 2.0 ** (math.frexp(typical)[1] - 1 - max(grid.mantissa, 0))
    return Noise(int((delta != 0).sum()), step)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(_bytes(tensor)).digest()[:_DIGEST]


@dataclass
class _Entries:
    """What both sides know of the entries that are not in an equal row, flat: the predicted value as an integer, how
    many low bits are raw, and the context; entries near zero have the contexts from COARSE on."""

    predicted: Integers
    shift: Integers
    context: Integers

    def normal(self, where: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return where & (self.context < COARSE)


def _entries(grid: Grid, predicted: Integers, spread: Integers) -> _Entries:
    """``spread``: four times the base-two logarithm of the expected error, int64 of the same shape."""
    magnitude, mantissa = magnitudes(predicted), max(grid.mantissa, 0)
    exponent = np.maximum(magnitude >> mantissa, 1) - grid.bias
    relative = spread - 4 * (exponent - grid.mantissa)
    near = spread + 6 >= 4 * exponent
    shift = np.where(
        near, max(mantissa - KEPT_MANTISSA, 0), np.clip((relative >> 2) - 1, 0, 8 * grid.dtype.itemsize - 2)
    )
    half = (magnitude >> (mantissa - 1)) & 1 if mantissa else 0
    distance = np.clip((spread - 4 * exponent - 2 * half + 6) >> 1, 0, NEAR - COARSE - 1)
    context = np.where(relative >= 4, relative & 3, FINE + np.clip(relative + 12, 0, COARSE - FINE - 1))
    return _Entries(predicted.ravel(), shift.ravel(), np.where(near, COARSE + distance, context).ravel())


@dataclass
class _Raw:
    """Bits that no model can shorten: values of equal width together, narrow ones first."""

    data: bytearray = field(default_factory=bytearray)

    def put(self, values: Integers, widths: Integers) -> None:
        for width in np.flatnonzero(np.bincount(widths)) if len(widths) else ():
            self.data += pack(values[widths == width], int(width))

    def take(self, widths: Integers) -> Integers:
        values = np.zeros(len(widths), dtype=np.int64)
        for width in np.flatnonzero(np.bincount(widths)) if len(widths) else ():
            where = widths == width
            count = int(where.sum())
            size = packed_bytes(count, int(width))
            if size > len(self.data):
                raise CorruptOffsets("the raw bits are cut short")
            values[where] = unpack(bytes(self.data[:size]), count, int(width))
            del self.data[:size]
        return values


def _low(values: Integers, shift: Integers) -> Integers:
    return values & ((np.int64(1) << shift) - 1)


def _encode_block(expert: Tensor, prediction: Prediction, start: int) -> bytes:
    grid = grid_of(expert)
    wanted = grid.order(expert)
    stop = start + len(expert)
    plain = prediction.plain(start, stop)
    predicted = grid.order(plain)
    kinds = np.where((wanted == predicted).all(1), EQUAL, PLAIN)
    error = (expert.double() - plain.double()).abs()
    if prediction.has_offset and (kinds != EQUAL).any():
        other = prediction.offset(start, stop)
        ordered = grid.order(other)
        better = (_cost(wanted - ordered) < _cost(wanted - predicted)) & (kinds != EQUAL)
        kinds[better] = OFFSET
        predicted[better] = ordered[better]
        chosen = torch.from_numpy(better)[:, None]
        error = torch.where(chosen, (expert.double() - other.double()).abs(), error)
    active = kinds != EQUAL
    unit = float(2.0 ** -max(grid.mantissa, 0)) * float(expert.double().square().mean().sqrt())
    rows, columns = scale_codes(error[torch.from_numpy(active)].numpy(), unit / 4)
    entries = _entries(grid, predicted[active], rows[:, None] + columns[None, :])
    raw = _Raw()
    sequences = _encode_entries(entries, wanted[active].ravel(), raw)
    top = sequences.pop(0)
    head = np.array([grid.trailing, *top], dtype=np.int64)
    coded = coder.encode([head, kinds.astype(np.int64), _shortest(rows), _shortest(columns), *sequences])
    return len(coded).to_bytes(4, "little") + coded + bytes(raw.data)


def _cost(difference: Integers) -> NDArray[np.float64]:
    total: NDArray[np.float64] = np.log2(1.0 + np.abs(difference).astype(np.float64)).sum(1)
    return total


def _shortest(codes: Integers) -> Integers:
    """Codes that are all the same are stored once."""
    return codes[:1] if len(codes) and (codes == codes[0]).all() else codes


def _encode_entries(entries: _Entries, wanted: Integers, raw: _Raw) -> list[Integers]:
    difference = wanted - entries.predicted
    hits = difference[entries.shift > 0] == 0
    flags = hits.astype(np.int64) if len(hits) and hits.mean() > SPIKE else np.zeros(0, dtype=np.int64)
    left = np.ones(len(wanted), dtype=bool)
    if len(flags):
        left[entries.shift > 0] = flags == 0
    normal, near = entries.normal(left), left & (entries.context >= COARSE)
    shift, near_shift = entries.shift[normal], entries.shift[near]
    high = difference[normal] >> shift
    size = magnitudes(wanted[near])
    scaled = size >> near_shift
    top = int(scaled.max(initial=0))
    depth = top - scaled
    beyond = [*_beyond(high), *_beyond(depth)]
    excess = np.concatenate(beyond) + 1
    lengths = _bit_length(excess) - 1
    raw.put(_low(difference[normal], shift), shift)
    raw.put(_low(size, near_shift), near_shift)
    raw.put(_low(excess, lengths), lengths)
    agrees = ((wanted[near] < 0) == (entries.predicted[near] < 0)).astype(np.int64)
    return [
        np.array([top], dtype=np.int64),
        flags,
        lengths,
        *_by_context(np.clip(high, -WINDOW, WINDOW - 1), entries.context[normal], 0, COARSE),
        *_by_context(np.clip(depth, 0, WINDOW - 1), entries.context[near], COARSE, NEAR),
        *_by_context(agrees, entries.context[near], COARSE, NEAR),
    ]


def _beyond(values: Integers) -> tuple[Integers, Integers]:
    """How far values lie beyond the last symbols of the window, above and below."""
    return values[values >= WINDOW - 1] - (WINDOW - 1), -WINDOW - values[values <= -WINDOW]


def _bit_length(values: Integers) -> Integers:
    """Of positive integers, exactly."""
    lengths = np.zeros(len(values), dtype=np.int64)
    rest = values.copy()
    while rest.any():
        lengths += rest > 0
        rest >>= 1
    return lengths


def _by_context(values: Integers, contexts: Integers, first: int, last: int) -> list[Integers]:
    return [values[contexts == context] for context in range(first, last)]


def _decode_block(data: bytes, prediction: Prediction, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    length = int.from_bytes(data[:4], "little")
    rows, columns = stop - start, prediction.shape[1]
    sequences = coder.decode(data[4 : 4 + length], max_symbols=5 * rows * columns + 3 * (rows + columns) + 1000)
    if len(sequences) != 6 + COARSE + 2 * (NEAR - COARSE) or len(sequences[0]) != 2:
        raise CorruptOffsets("a block has another number of parts")
    head, kinds, row_codes, column_codes = sequences[:4]
    active = kinds != EQUAL
    grid = Grid(dtype, _within(int(head[0]), 8 * dtype.itemsize - 1))
    result = prediction.plain(start, stop)
    predicted = grid.order(result)
    if len(kinds) != rows or not set(np.unique(kinds).tolist()) <= {EQUAL, PLAIN, OFFSET}:
        raise CorruptOffsets("a block has another number of rows")
    if (kinds == OFFSET).any():
        ordered = grid.order(prediction.offset(start, stop))
        predicted[kinds == OFFSET] = ordered[kinds == OFFSET]
    spread = _whole(row_codes, int(active.sum()))[:, None] + _whole(column_codes, columns)[None, :]
    entries = _entries(grid, predicted[active], spread)
    raw = _Raw(bytearray(data[4 + length :]))
    predicted[active] = _decode_entries(entries, int(head[1]), sequences[4:], raw).reshape(-1, columns)
    if raw.data:
        raise CorruptOffsets("a block has more raw bits than entries")
    return grid.values(predicted)


def _within(value: int, most: int) -> int:
    if not 0 <= value <= most:
        raise CorruptOffsets("a block's header is out of range")
    return value


def _whole(codes: Integers, count: int) -> Integers:
    """The inverse of ``_shortest``."""
    if len(codes) not in (min(count, 1), count):
        raise CorruptOffsets("a block has another number of scales")
    return np.broadcast_to(codes.astype(np.int64), (count,))


def _decode_entries(entries: _Entries, top: int, sequences: list[Integers], raw: _Raw) -> Integers:
    flags, lengths = sequences[:2]
    if lengths.min(initial=0) < 0 or lengths.max(initial=0) > 62:
        raise CorruptOffsets("the excess of an entry has an impossible length")
    left = np.ones(len(entries.predicted), dtype=bool)
    if len(flags):
        if len(flags) != int((entries.shift > 0).sum()):
            raise CorruptOffsets("a block has another number of hits")
        left[entries.shift > 0] = flags == 0
    normal, near = entries.normal(left), left & (entries.context >= COARSE)
    shift, near_shift = entries.shift[normal], entries.shift[near]
    parts = NEAR - COARSE
    high = _from_contexts(sequences[2 : 2 + COARSE], entries.context[normal], 0)
    depth = _from_contexts(sequences[2 + COARSE : 2 + COARSE + parts], entries.context[near], COARSE)
    agrees = _from_contexts(sequences[2 + COARSE + parts :], entries.context[near], COARSE)
    low, near_low = raw.take(shift), raw.take(near_shift)
    excess = (raw.take(lengths) | (np.int64(1) << lengths)) - 1
    _widen(high, depth, excess)
    wanted = entries.predicted.copy()
    wanted[normal] += (high << shift) | low
    size = ((top - depth) << near_shift) | near_low
    negative = (entries.predicted[near] < 0) == (agrees == 1)
    wanted[near] = np.where(negative, ~size, size)
    return wanted


def _widen(high: Integers, depth: Integers, excess: Integers) -> None:
    """Give the values at the edges of the window what they lie beyond it."""
    at = 0
    for values, edge, sign in ((high, WINDOW - 1, 1), (high, -WINDOW, -1), (depth, WINDOW - 1, 1)):
        where = np.flatnonzero(values == edge)
        if at + len(where) > len(excess):
            raise CorruptOffsets("the excess of some entries is missing")
        values[where] += sign * excess[at : at + len(where)]
        at += len(where)


def _from_contexts(sequences: list[Integers], contexts: Integers, first: int) -> Integers:
    values = np.zeros(len(contexts), dtype=np.int64)
    for index, sequence in enumerate(sequences):
        where = contexts == first + index
        if int(where.sum()) != len(sequence):
            raise CorruptOffsets("a context has another number of entries")
        values[where] = sequence
    return values
