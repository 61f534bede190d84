"""The quantiser's curves are what the quantiser does."""

import numpy as np
import pytest
import torch

from retex_cli.offsets.quantiser import LEVELS, NORMAL, centroid_shifts, dequantise, measure, quantise, step


@pytest.fixture(scope="module")
def normal() -> torch.Tensor:
    return torch.randn(1, 400_000, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("level", [1, 2, 4, 6, 10])
def test_the_normal_curve_is_what_happens_to_normal_entries(normal: torch.Tensor, level: int) -> None:
    symbols = quantise(normal, level)
    decoded = dequantise(symbols, level, centroid_shifts(normal, symbols, level))
    _, counts = symbols.unique(return_counts=True)
    share = counts / counts.sum()
    entropy = -(share * share.log2()).sum().item()
    assert (normal - decoded).square().mean().item() == pytest.approx(NORMAL.distortions[level], rel=0.02)
    assert entropy == pytest.approx(NORMAL.rates[level], rel=0.01)


def test_no_level_is_worse_than_dropping_and_finer_is_never_worse() -> None:
    assert NORMAL.distortions[0] < 1
    assert np.all(np.diff(NORMAL.distortions) < 0)
    assert np.all(np.diff(NORMAL.rates) > 0)
    assert len(NORMAL.rates) == 2 * LEVELS


def test_cell_middles_would_lose_where_means_gain(normal: torch.Tensor) -> None:
    symbols = quantise(normal, 2)
    middles = (normal - dequantise(symbols, 2, [0, 0, 0])).square().mean().item()
    assert middles > 1.15 * NORMAL.distortions[2]


def test_sparse_entries_cost_less_and_keep_more(normal: torch.Tensor) -> None:
    sparse = normal.clone()
    sparse[:, ::10] *= 40
    sparse = sparse / sparse.square().mean().sqrt()
    curve = measure(sparse)
    assert curve.rates[2] < 0.7 * NORMAL.rates[2]
    assert np.all(np.diff(curve.distortions) <= 0)
    same = measure(normal)
    np.testing.assert_allclose(same.rates[1:10], NORMAL.rates[1:10], rtol=0.02)
    np.testing.assert_allclose(same.distortions[1:10], NORMAL.distortions[1:10], rtol=0.05)


@pytest.mark.parametrize("level", range(LEVELS))
def test_decoding_is_odd_and_monotone(level: int) -> None:
    symbols = torch.tensor([-100_000, -3, -1, 0, 1, 3, 100_000])
    decoded = dequantise(symbols, level, [10, 5, 2])
    assert torch.equal(decoded, -decoded.flip(0))
    assert torch.all(decoded.diff() > 0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
@pytest.mark.parametrize("level", [0, 5, 23])
def test_many_entries_decode_to_the_bits_of_each_by_itself(level: int, dtype: torch.dtype) -> None:
    symbols = torch.arange(-7, 12, dtype=dtype)
    each = torch.cat([dequantise(symbol[None], level, [10, 5, 2]) for symbol in symbols])
    assert torch.equal(dequantise(symbols.repeat(3, 1), level, [10, 5, 2]), each.repeat(3, 1))
    small = symbols[6:9].repeat(5)
    assert torch.equal(dequantise(small, level, [10, 5, 2]), each[6:9].repeat(5))
    assert torch.equal(dequantise(symbols[::18], level, [10, 5, 2]), each[::18])
    assert dequantise(symbols[:0], level, [10, 5, 2]).shape == (0,)


def test_steps_halve_every_two_levels() -> None:
    assert all(step(level + 2) == step(level) / 2 for level in range(LEVELS - 2))
