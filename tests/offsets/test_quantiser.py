"""The quantiser's tables are what the quantiser does."""

import math

import numpy as np
import pytest
import torch

from retex_cli.offsets.quantiser import DISTORTIONS, LEVELS, RATES, STEPS, dequantise, quantise


@pytest.fixture(scope="module")
def normal() -> torch.Tensor:
    return torch.randn(400_000, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("level", [0, 1, 2, 4, 8])
def test_tables_match_what_happens_to_normal_entries(normal: torch.Tensor, level: int) -> None:
    symbols = quantise(normal, level)
    error = (normal - dequantise(symbols, level)).square().mean().item()
    _, counts = symbols.unique(return_counts=True)
    share = counts / counts.sum()
    entropy = -(share * share.log2()).sum().item()
    assert error == pytest.approx(DISTORTIONS[level], rel=0.02)
    assert entropy == pytest.approx(RATES[level], rel=0.01)


def test_no_level_is_worse_than_dropping_and_finer_is_never_worse() -> None:
    assert DISTORTIONS[0] < 1
    assert np.all(np.diff(DISTORTIONS) < 0)
    assert np.all(np.diff(RATES) > 0)


def test_cell_middles_would_lose_where_centroids_gain(normal: torch.Tensor) -> None:
    symbols = quantise(normal, 0)
    middles = (normal - symbols * STEPS[0]).square().mean().item()
    assert middles > 1.15 * DISTORTIONS[0]


@pytest.mark.parametrize("level", range(LEVELS))
def test_decoding_is_odd_monotone_and_defined_far_out(level: int) -> None:
    symbols = torch.tensor([-100_000, -3, -1, 0, 1, 3, 100_000])
    decoded = dequantise(symbols, level)
    assert torch.equal(decoded, -decoded.flip(0))
    assert torch.all(decoded.diff() > 0)
    assert decoded[-1].item() == pytest.approx(100_000 * STEPS[level])


def test_steps_halve_every_two_levels() -> None:
    assert all(math.isclose(STEPS[level + 2], STEPS[level] / 2) for level in range(LEVELS - 2))
