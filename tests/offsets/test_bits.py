"""Floating-point patterns as ordered integers, and integers of a few bits as bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retex_cli.offsets.bits import Grid, grid_of, pack, packed_bytes, unpack

TYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
)
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_pattern_comes_back(dtype: torch.dtype) -> None:
    """NaN, infinities and both zeros included."""
    word = WORDS[dtype.itemsize]
    limits = torch.iinfo(word)
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(limits.min, limits.max, (5000,), dtype=word, generator=generator)
    patterns = torch.cat([patterns, torch.tensor([0, -1, limits.min, limits.max], dtype=word)])
    grid = Grid(dtype, 0)
    order = grid.order(patterns.view(dtype))
    assert torch.equal(grid.values(order).view(word), patterns)
    assert len(np.unique(order)) == len(patterns.unique())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_larger_values_have_larger_integers(dtype: torch.dtype) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1)).to(dtype).unique()
    order = Grid(dtype, 0).order(values)
    assert (np.diff(order) > 0).all()
    assert Grid(dtype, 0).order(torch.tensor([-0.0, 0.0], dtype=dtype)).tolist() == [-1, 0]


def test_bfloat16_stored_as_float32_has_a_coarser_grid() -> None:
    values = torch.randn(100, generator=torch.Generator().manual_seed(2)).bfloat16().float()
    grid = grid_of(values)
    assert (grid.trailing, grid.mantissa) == (16, 7)
    assert torch.equal(grid.values(grid.order(values)), values)
    near = values + values.abs() * 2.0**-10  # less than half of a step of the grid away
    assert torch.equal(grid.values(grid.order(near)), values)


def test_zeros_alone_have_a_grid() -> None:
    zeros = torch.tensor([[0.0, -0.0]])
    grid = grid_of(zeros)
    assert grid.values(grid.order(zeros)).signbit().tolist() == [[False, True]]


@given(st.integers(0, 62), st.lists(st.integers(0, 2**62 - 1), max_size=40))
def test_packed_values_come_back(bits: int, values: list[int]) -> None:
    array = np.array(values, dtype=np.int64) & ((1 << bits) - 1)
    data = pack(array, bits)
    assert len(data) == packed_bytes(len(array), bits)
    assert unpack(data, len(array), bits).tolist() == array.tolist()
