"""The allocation spends what it may, in order of gain per bit, and more never buys less."""

import itertools

import numpy as np
import pytest

from retex_cli.offsets.allocate import Candidates, allocate
from retex_cli.offsets.quantiser import LEVELS, NORMAL

KEPT = (1 - NORMAL.distortions[:LEVELS]) ** 2


def product(energies: np.ndarray, entries: int) -> Candidates:
    """Outer products of two normal vectors with ``entries`` numbers together."""
    return Candidates(energies, KEPT, 6 + entries * NORMAL.rates[:LEVELS])


def cost(candidates: list[Candidates], levels: list[list[int]]) -> float:
    return sum(c.bits[level] for c, kept in zip(candidates, levels, strict=True) for level in kept)


def kept_energy(candidates: list[Candidates], levels: list[list[int]]) -> float:
    return sum(
        c.energies[i] * c.kept[level]
        for c, kept in zip(candidates, levels, strict=True)
        for i, level in enumerate(kept)
    )


@pytest.fixture
def candidates() -> list[Candidates]:
    generator = np.random.default_rng(1)
    matrices = [product(np.sort(generator.exponential(size=30) ** 3)[::-1], n) for n in (64, 300, 5000)]
    vector = Candidates(np.array([0.3]), 1 - NORMAL.distortions[:LEVELS], 6 + 64 * NORMAL.rates[:LEVELS])
    return [*matrices, vector, product(np.zeros(0), 0)]


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
    strong, weak = product(np.array([100.0]), 100), product(np.array([1.0]), 100)
    levels = allocate([weak, strong], strong.bits[strong.hull[0]] + 1)
    assert levels[0] == []
    assert len(levels[1]) == 1


def test_equal_prices_equal_treatment() -> None:
    twins = [product(np.array([4.0, 1.0]), 100), product(np.array([4.0, 1.0]), 100)]
    bits = 2 * sum(twins[0].bits[level] for level in (6, 4))
    first, second = allocate(twins, bits)
    assert first == second


def test_close_to_the_best_of_all_allocations() -> None:
    """Against exhaustive search over three components and four levels."""
    candidate = product(np.array([9.0, 4.0, 1.0]), 50)
    bits, best = 300.0, 0.0
    for levels in itertools.product(range(-1, 8), repeat=3):
        chosen = [(e, level) for e, level in zip(candidate.energies, levels, strict=True) if level >= 0]
        if sum(candidate.bits[level] for _, level in chosen) <= bits:
            best = max(best, sum(e * candidate.kept[level] for e, level in chosen))
    assert kept_energy([candidate], allocate([candidate], bits)) > 0.97 * best


def test_levels_off_the_hull_are_never_worth_it() -> None:
    candidate = product(np.array([1.0]), 1000)
    points = [(0.0, 0.0), *((candidate.bits[level], candidate.kept[level]) for level in candidate.hull)]
    slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in itertools.pairwise(points)]
    assert slopes == sorted(slopes, reverse=True)
    assert candidate.hull[0] > 0  # the coarsest normal level costs more than it keeps
    for level in range(LEVELS):
        reached = np.interp(candidate.bits[level], [x for x, _ in points], [y for _, y in points])
        assert candidate.kept[level] <= reached + 1e-9
