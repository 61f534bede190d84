"""The budget of a lossless fit: more offsets as long as they save more than they cost."""

from __future__ import annotations

import numpy as np

from retex_cli.offsets.allocate import Candidates
from retex_cli.offsets.quantiser import LEVELS, NORMAL
from retex_cli.offsets.total import Noise, cheapest_total


def tensor(energies: list[float], entries: int) -> Candidates:
    return Candidates(np.array(energies), 1 - NORMAL.distortions[:LEVELS], 6 + entries * NORMAL.rates[:LEVELS])


def test_noise_without_structure_is_left_to_the_correction() -> None:
    flat = tensor([1.0] * 100, 200)
    assert cheapest_total([flat], [Noise(100 * 100, 1e-6)], 20_000) < 1000


def test_structure_is_worth_its_bytes() -> None:
    steep = tensor([4.0**-k for k in range(100)], 200)
    assert cheapest_total([steep], [Noise(100 * 100, 1e-6)], 20_000) > 1000


def test_nothing_is_spent_below_the_last_bit() -> None:
    steep = tensor([4.0**-k for k in range(100)], 200)
    fine = cheapest_total([steep], [Noise(100 * 100, 1e-6)], 20_000)
    coarse = cheapest_total([steep], [Noise(100 * 100, 0.1)], 20_000)
    assert coarse < fine / 4
