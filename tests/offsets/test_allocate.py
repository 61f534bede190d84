"""The allocation spends what it may, in order of gain per bit, and more never buys less."""

import numpy as np
import pytest

from retex_cli.offsets.allocate import COMPONENT_BITS, Candidates, allocate, minimum_bits
from retex_cli.offsets.quantiser import DISTORTIONS, RATES


def cost(candidates: list[Candidates], levels: list[list[int]]) -> float:
    return sum(
        COMPONENT_BITS + c.entries * RATES[level] for c, kept in zip(candidates, levels, strict=True) for level in kept
    )


def kept_energy(candidates: list[Candidates], levels: list[list[int]]) -> float:
    return sum(
        c.energies[i] * (1 - DISTORTIONS[level]) ** c.factors
        for c, kept in zip(candidates, levels, strict=True)
        for i, level in enumerate(kept)
    )


@pytest.fixture
def candidates() -> list[Candidates]:
    generator = np.random.default_rng(1)
    matrices = [Candidates(np.sort(generator.exponential(size=30) ** 3)[::-1], n, 2) for n in (64, 300, 5000)]
    return [*matrices, Candidates(np.array([0.3]), 64, 1), Candidates(np.zeros(0), 0, 1)]


def test_never_over_budget_and_monotone_in_it(candidates: list[Candidates]) -> None:
    before = -1.0
    for bits in (0, 50, 100, 500, 2_000, 10_000, 50_000, 200_000, 2_000_000):
        levels = allocate(candidates, bits)
        assert cost(candidates, levels) <= bits + 1e-6
        gained = kept_energy(candidates, levels)
        assert gained >= before
        before = gained
    assert kept_energy(candidates, levels) > 0.999 * sum(c.energies.sum() for c in candidates)


def test_leading_components_first_and_finest(candidates: list[Candidates]) -> None:
    for kept in allocate(candidates, 20_000):
        assert kept == sorted(kept, reverse=True)


def test_a_strong_component_is_taken_before_a_weak_one() -> None:
    strong, weak = Candidates(np.array([100.0]), 100, 2), Candidates(np.array([1.0]), 100, 2)
    levels = allocate([weak, strong], minimum_bits(100, 2) + 1)
    assert levels[0] == []
    assert len(levels[1]) == 1


def test_equal_prices_equal_treatment() -> None:
    twins = [Candidates(np.array([4.0, 1.0]), 100, 2), Candidates(np.array([4.0, 1.0]), 100, 2)]
    bits = 2 * sum(100 * RATES[level] + COMPONENT_BITS for level in (4, 2))
    first, second = allocate(twins, bits)
    assert first == second


def test_close_to_the_best_of_all_allocations() -> None:
    """Against exhaustive search over three components and four levels."""
    energies = np.array([9.0, 4.0, 1.0])
    candidate = Candidates(energies, 50, 2)
    bits = 300.0
    best = 0.0
    for a in range(-1, 6):
        for b in range(-1, 6):
            for c in range(-1, 6):
                chosen = (a, b, c)
                spent = sum(COMPONENT_BITS + 50 * RATES[level] for level in chosen if level >= 0)
                gained = sum(e * (1 - DISTORTIONS[x]) ** 2 for e, x in zip(energies, chosen, strict=True) if x >= 0)
                if spent <= bits:
                    best = max(best, gained)
    assert kept_energy([candidate], allocate([candidate], bits)) > 0.97 * best
