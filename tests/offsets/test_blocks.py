"""Blocks tile a tensor in whole rows, or in parts of one, and none is larger than it has to be."""

from __future__ import annotations

import math

import pytest
import torch

from retex_cli.offsets import blocks
from retex_cli.offsets.blocks import columns_of, row_blocks, spans

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "shape", [(7, 5), (3, 200), (500,), (), (0, 4), (4, 0), (2, 3, 5, 5), (1, 1), (70, 1)], ids=str
)
def test_they_tile_the_tensor(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 64)
    found, columns = spans(shape, CPU), columns_of(shape)
    assert [k for start, stop in found for k in range(start, stop)] == list(range(math.prod(shape)))
    for start, stop in found:
        assert 0 < stop - start <= 64
        assert (start % columns == 0 and stop % columns == 0) or start // columns == (stop - 1) // columns


def test_a_gpu_gets_larger_ones() -> None:
    assert len(spans((1 << 12, 1 << 10), torch.device("cuda"))) == 1
    assert len(spans((1 << 12, 1 << 10), CPU)) == 8


def test_a_row_is_never_cut_where_rows_belong_together() -> None:
    assert row_blocks(3, 100, 64) == [(0, 1), (1, 2), (2, 3)]
    assert row_blocks(5, 20, 64) == [(0, 3), (3, 5)]
    assert row_blocks(5, 0, 64) == []
