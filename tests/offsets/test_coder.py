"""Sequences come back as they went in, near their entropy, and damage is noticed or harmless, never a crash."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retex_cli.offsets import coder
from retex_cli.offsets.coder import CorruptOffsets, decode, encode


def sequences() -> st.SearchStrategy[list[list[int]]]:
    return st.lists(st.lists(st.integers(-(2**20), 2**20), max_size=40), max_size=5)


@settings(max_examples=60, deadline=None)
@given(sequences())
def test_round_trip(values: list[list[int]]) -> None:
    arrays = [np.array(value, dtype=np.int64) for value in values]
    decoded = decode(encode(arrays), max_symbols=1000)
    assert [array.tolist() for array in decoded] == values


def test_costs_the_entropy() -> None:
    symbols = np.random.default_rng(0).normal(scale=1.5, size=100_000).round().astype(np.int64)
    _, counts = np.unique(symbols, return_counts=True)
    share = counts / counts.sum()
    entropy_bytes = -(share * np.log2(share)).sum() * len(symbols) / 8
    assert len(encode([symbols])) < 1.002 * entropy_bytes + 40


def test_wide_ranges_need_no_wide_table() -> None:
    symbols = np.random.default_rng(0).normal(scale=4000, size=200).round().astype(np.int64)
    assert len(encode([symbols])) < 200 * 2 + 150


@settings(max_examples=30, deadline=None)
@given(st.integers(4090, 70_000), st.integers(1, 17), st.integers(-130, 130), st.integers(0, 99))
def test_long_sequences_come_back_whatever_their_length_and_range(length: int, size: int, low: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    values = low + draw.choice(size, length, p=draw.dirichlet(np.full(size, 0.3)))
    (decoded,) = decode(encode([values]), max_symbols=length)
    assert decoded.tolist() == values.tolist()


def test_symbols_that_are_coded_as_one_take_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    symbols = np.random.default_rng(0).choice([-1, 0, 1], 50_001, p=[0.05, 0.9, 0.05])
    together = encode([symbols])
    monkeypatch.setattr(coder, "_LONG", 1 << 40)
    alone = encode([symbols])
    assert together != alone
    assert abs(len(together) - len(alone)) <= 4
    for data in (together, alone):  # what was written one by one is read
        assert decode(data, max_symbols=50_001)[0].tolist() == symbols.tolist()


def test_values_beyond_32_bits_come_back() -> None:
    values = np.array([2**40 + 3, 2**40, 2**40 + 900], dtype=np.int64)
    assert decode(encode([values, -values]), max_symbols=10)[0].tolist() == values.tolist()
    assert decode(encode([values, -values]), max_symbols=10)[1].tolist() == (-values).tolist()


def test_constant_sequences_cost_next_to_nothing() -> None:
    assert len(encode([np.full(10_000, -7)])) < 12


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_or_decoded_but_never_crash(data: bytes) -> None:
    try:
        decoded = decode(data, max_symbols=10_000)
    except CorruptOffsets:
        return
    assert sum(map(len, decoded)) <= 10_000


def test_an_announced_length_cannot_ask_for_all_memory() -> None:
    with pytest.raises(CorruptOffsets, match="symbols announced"):
        decode(encode([np.zeros(5000, dtype=np.int64)]), max_symbols=4999)


def test_truncated_bytes_are_refused() -> None:
    data = encode([np.arange(100)])
    with pytest.raises(CorruptOffsets):
        decode(data[:-1], max_symbols=1000)
