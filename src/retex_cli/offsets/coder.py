"""Entropy coding of named integer sequences into one byte string, by range asymmetric numeral systems.

Each sequence carries its own table of symbol frequencies; symbols of a wide range are split into a coded high part and
uniform low bits, because a table with an entry for each value would cost more than it saves. The coder itself is
``constriction``'s.
"""

from __future__ import annotations

from collections.abc import Sequence

import constriction
import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.signedinteger]

MAX_ALPHABET = 64
_TYPES = tuple(np.iinfo(kind) for kind in (np.int8, np.int16, np.int32, np.int64))
_CHUNK = 1 << 16
"""Symbols that are decoded at once: what they become is narrower, and fits where it is used."""
_TABLE_TOTAL = 4096
_Categorical = constriction.stream.model.Categorical


class CorruptOffsets(ValueError):
    """The bytes cannot be what the encoder wrote."""


def _put_varint(out: bytearray, value: int) -> None:
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def varint(self) -> int:
        value = shift = 0
        while True:
            if self.position >= len(self.data) or shift > 56:
                raise CorruptOffsets("a table ends early")
            byte = self.data[self.position]
            self.position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7


def _frequencies(values: Integers, size: int) -> Integers:
    """Counts scaled to a small total, so that each takes a byte or two; a symbol that occurs keeps at least one."""
    counts = np.bincount(values, minlength=size)
    if counts.sum() <= _TABLE_TOTAL:
        return counts
    scaled = np.rint(counts * (_TABLE_TOTAL / counts.sum())).astype(np.int64)
    return np.where(counts > 0, np.maximum(scaled, 1), 0)


def _model(frequencies: Integers) -> object:
    return _Categorical(frequencies.astype(np.float64) / frequencies.sum(), perfect=False)


def encode(sequences: Sequence[Integers]) -> bytes:
    """Bytes of ``sequences`` (one-dimensional, any length); ``decode`` gives the values back in the same order."""
    head = bytearray()
    jobs: list[tuple[NDArray[np.int32], object]] = []
    _put_varint(head, len(sequences))
    for sequence in sequences:
        _put_varint(head, len(sequence))
        if not len(sequence):
            continue
        low = int(sequence.min())
        shifted = sequence - low
        spread = int(shifted.max())
        bits = 0
        while spread >> bits >= MAX_ALPHABET:
            bits += 1
        high = shifted >> bits
        frequencies = _frequencies(high, int(high.max()) + 1)
        _put_varint(head, low << 1 if low >= 0 else (-low << 1) - 1)
        _put_varint(head, bits)
        _put_varint(head, len(frequencies))
        if len(frequencies) > 1:
            for frequency in frequencies:
                _put_varint(head, int(frequency))
            jobs.append((high.astype(np.int32), _model(frequencies)))
        if bits:
            jobs.append(((shifted & ((1 << bits) - 1)).astype(np.int32), _uniform(bits)))
    coder = constriction.stream.stack.AnsCoder()
    for symbols, model in reversed(jobs):  # a stack: what is decoded first goes in last
        coder.encode_reverse(symbols, model)
    words: NDArray[np.uint32] = coder.get_compressed()
    return bytes(head) + words.astype("<u4").tobytes()


def _uniform(bits: int) -> object:
    return constriction.stream.model.Uniform(1 << bits)


def decode(data: bytes, *, max_symbols: int) -> list[Integers]:
    """The sequences that ``encode`` was given, each in the narrowest signed type that has room for its table.

    Raises ``CorruptOffsets`` for tables that cannot be, and when more than ``max_symbols`` symbols are announced, so
    that a damaged length cannot ask for all the memory there is.
    """
    reader = _Reader(data)
    tables: list[tuple[int, int, int, Integers | None]] = []
    total = 0
    for _ in range(_checked(reader.varint(), 1 << 16, "sequences")):
        length = reader.varint()
        total = _checked(total + length, max_symbols, "symbols")
        if not length:
            tables.append((0, 0, 0, None))
            continue
        zigzag = reader.varint()
        low = zigzag >> 1 if zigzag % 2 == 0 else -((zigzag + 1) >> 1)
        bits = _checked(reader.varint(), 24, "low bits")
        size = _checked(reader.varint(), MAX_ALPHABET, "table entries")
        frequencies = np.array([reader.varint() for _ in range(size)] if size > 1 else [1], dtype=np.int64)
        if not 0 < frequencies.sum() < 1 << 32:
            raise CorruptOffsets("a table of frequencies has an impossible sum")
        tables.append((length, low, bits, frequencies))
    body = data[reader.position :]
    if len(body) % 4:
        raise CorruptOffsets("the coded symbols are cut short")
    try:
        coder = constriction.stream.stack.AnsCoder(np.frombuffer(body, dtype="<u4").astype(np.uint32))
    except ValueError as error:
        raise CorruptOffsets("the coded symbols end in an impossible word") from error
    return [_decode_one(coder, *table) for table in tables]


def _decode_one(
    coder: constriction.stream.stack.AnsCoder, length: int, low: int, bits: int, frequencies: Integers | None
) -> Integers:
    if frequencies is None:
        return np.zeros(0, dtype=np.int8)
    high = low + (len(frequencies) << bits) - 1
    dtype = next((kind.dtype for kind in _TYPES if kind.min <= low and high <= kind.max), np.dtype(np.int64))
    values: Integers = np.full(length, low, dtype)
    if len(frequencies) > 1:
        model = _model(frequencies)
        for start in range(0, length, _CHUNK):
            part = values[start : start + _CHUNK]
            part += (coder.decode(model, len(part)) << bits).astype(part.dtype)
    if bits:
        model = _uniform(bits)
        for start in range(0, length, _CHUNK):
            part = values[start : start + _CHUNK]
            part += coder.decode(model, len(part)).astype(part.dtype)
    return values


def _checked(value: int, most: int, what: str) -> int:
    if value > most:
        raise CorruptOffsets(f"{value} {what} announced where at most {most} can be")
    return value
