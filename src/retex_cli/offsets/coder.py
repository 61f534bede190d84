"""Entropy coding of named integer sequences into one byte string, by range asymmetric numeral systems.

Each sequence carries its own table of symbol frequencies; symbols of a wide range are split into a coded high part and
uniform low bits, because a table with an entry for each value would cost more than it saves. Of a long sequence of few
different symbols several are coded as one, with the product of their frequencies: as many bytes, sooner decoded. The
coder itself is ``constriction``'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import constriction
import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.signedinteger]

MAX_ALPHABET = 64
_TYPES = tuple(np.iinfo(kind) for kind in (np.int8, np.int16, np.int32, np.int64))
_CHUNK = 1 << 16
"""Symbols that are decoded at once: what they become is narrower, and fits where it is used."""
_TABLE_TOTAL = 4096
_LONG = 1 << 12
"""Symbols from which on several are coded as one."""
_PACKED = 256
"""The most combinations of these: beyond, finding one in their table takes as long as what it saves."""
_LOW_BITS = 24
_PACKING = 32
"""In the header, from here on: how many symbols are coded as one, in the place of low bits, which those have not."""
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


def _model(frequencies: Integers, packing: int) -> object:
    """Of so many symbols as one, the first of them counting most."""
    share = frequencies.astype(np.float64) / frequencies.sum()
    shares = np.ones(1)
    for _ in range(packing):
        shares = np.outer(shares, share).ravel()
    return _Categorical(shares, perfect=False)


def _packing(length: int, size: int) -> int:
    """How many of ``length`` symbols from a table of ``size`` are coded as one."""
    packing = 1
    while size > 1 and length >= _LONG and size ** (2 * packing) <= _PACKED:
        packing *= 2  # other groups are slower to look up
    return packing


def _packed(symbols: Integers, frequencies: Integers, packing: int) -> NDArray[np.int32]:
    """Groups of symbols as one number each; the last one is filled up with what costs least."""
    size = len(frequencies)
    filled = np.full(-(-len(symbols) // packing) * packing, frequencies.argmax(), dtype=np.int32)
    filled[: len(symbols)] = symbols
    return filled.reshape(-1, packing) @ (size ** np.arange(packing, dtype=np.int32)[::-1])


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
        packing = 1 if bits else _packing(len(sequence), len(frequencies))
        _put_varint(head, low << 1 if low >= 0 else (-low << 1) - 1)
        _put_varint(head, bits if packing == 1 else _PACKING + packing)
        _put_varint(head, len(frequencies))
        if len(frequencies) > 1:
            for frequency in frequencies:
                _put_varint(head, int(frequency))
            jobs.append((_packed(high, frequencies, packing), _model(frequencies, packing)))
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
    tables: list[_Table] = []
    total = 0
    for _ in range(_checked(reader.varint(), 1 << 16, "sequences")):
        length = reader.varint()
        total = _checked(total + length, max_symbols, "symbols")
        tables.append(_table(reader, length))
    body = data[reader.position :]
    if len(body) % 4:
        raise CorruptOffsets("the coded symbols are cut short")
    try:
        coder = constriction.stream.stack.AnsCoder(np.frombuffer(body, dtype="<u4").astype(np.uint32))
    except ValueError as error:
        raise CorruptOffsets("the coded symbols end in an impossible word") from error
    return [_decode_one(coder, table) for table in tables]


@dataclass(frozen=True)
class _Table:
    """A sequence's header: its length and smallest value, low bits that are coded apart, symbols that are coded as one,
    and how often each symbol is."""

    length: int
    low: int
    bits: int
    packing: int
    frequencies: Integers


def _table(reader: _Reader, length: int) -> _Table:
    if not length:
        return _Table(0, 0, 0, 1, np.ones(1, dtype=np.int64))
    zigzag = reader.varint()
    low = zigzag >> 1 if zigzag % 2 == 0 else -((zigzag + 1) >> 1)
    bits, packing = reader.varint(), 1
    if bits > _PACKING:
        bits, packing = 0, _checked(bits - _PACKING, 8, "symbols as one")
    _checked(bits, _LOW_BITS, "low bits")
    size = _checked(reader.varint(), MAX_ALPHABET, "table entries")
    if packing > 1:
        _checked(size**packing, _PACKED, "combinations of symbols")
    frequencies = np.array([reader.varint() for _ in range(size)] if size > 1 else [1], dtype=np.int64)
    if not 0 < frequencies.sum() < 1 << 32:
        raise CorruptOffsets("a table of frequencies has an impossible sum")
    return _Table(length, low, bits, packing, frequencies)


def _decode_one(coder: constriction.stream.stack.AnsCoder, table: _Table) -> Integers:
    low, bits, size = table.low, table.bits, len(table.frequencies)
    high = low + (size << bits) - 1
    dtype = next((kind.dtype for kind in _TYPES if kind.min <= low and high <= kind.max), np.dtype(np.int64))
    values: Integers = np.full(table.length, low, dtype)
    if size > 1:
        groups = np.array(list(product(range(size), repeat=table.packing)), dtype) << bits
        model = _model(table.frequencies, table.packing)
        for start in range(0, table.length, _CHUNK):
            part = values[start : start + _CHUNK]
            found = coder.decode(model, -(-len(part) // table.packing))
            part += groups.take(found, axis=0).reshape(-1)[: len(part)]  # indexing would take as long as decoding
    if bits:
        model = _uniform(bits)
        for start in range(0, table.length, _CHUNK):
            part = values[start : start + _CHUNK]
            part += coder.decode(model, len(part)).astype(part.dtype)
    return values


def _checked(value: int, most: int, what: str) -> int:
    if value > most:
        raise CorruptOffsets(f"{value} {what} announced where at most {most} can be")
    return value
