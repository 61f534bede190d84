"""Expected errors from codes of rows and columns, stored only where they pay."""

from __future__ import annotations

import numpy as np

from retex_cli.offsets.scales import scale_codes


def expected(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return np.exp2((rows[:, None] + columns[None, :]) / 4)


def noise(rows: int, columns: int) -> np.ndarray:
    return np.abs(np.random.default_rng(0).normal(size=(rows, columns)))


def test_rows_and_columns_of_different_spread_are_told_apart() -> None:
    rows, columns = 2.0 ** np.arange(-10, 10), 4.0 ** np.arange(-3, 3).repeat(20)
    spread = rows[:, None] * columns[None, :]
    found = expected(*scale_codes(noise(*spread.shape) * spread, 1e-9))
    distance = np.log2(found / spread)  # of a geometric mean from the standard deviation: 0.9 below, for normal noise
    assert (np.abs(distance + 0.9) < 1.5).all()


def test_equal_spread_is_stored_once() -> None:
    rows, columns = scale_codes(noise(50, 60) * 3e-4, 1e-9)
    assert len(set(rows.tolist())) == len(set(columns.tolist())) == 1
    assert abs(np.log2(expected(rows, columns)[0, 0] / 3e-4) + 0.9) < 0.3


def test_a_vector_has_one_scale_and_nothing_has_none() -> None:
    rows, columns = scale_codes(noise(1, 500), 1e-9)
    assert (len(rows), set(columns.tolist())) == (1, {0})
    rows, columns = scale_codes(np.zeros((0, 4)), 1e-9)
    assert (len(rows), len(columns)) == (0, 4)


def test_errors_below_the_least_are_not_told_apart() -> None:
    errors = np.array([1e-30, 1e-20, 0.0] * 100)[:, None] * np.ones((1, 200))
    rows, _ = scale_codes(errors, 2.0**-20)
    assert set(rows.tolist()) == {-80}
