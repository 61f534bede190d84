"""How large the errors of a prediction are expected to be, from a few numbers for each row and column."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

CODE_BITS = 4
"""About what one stored code costs."""
_FINE = 6
"""Octaves above the least error from which on an error of none is a hit of its own kind, not a small error."""


def scale_codes(errors: Floats, least: float) -> tuple[Integers, Integers]:
    """(rows, columns): ``(rows[i] + columns[j]) / 4`` is the base-two logarithm of the error expected at (i, j).

    ``errors`` float64 [m, n], not negative; ``least`` is the error below which nothing is gained by knowing it. Scales
    are geometric means, which single outliers hardly move. Codes of rows or columns are all equal where telling them
    apart would cost more than it saves.
    """
    rows, columns = errors.shape
    if not errors.size:
        return np.zeros(rows, dtype=np.int64), np.zeros(columns, dtype=np.int64)
    floor = np.log2(max(least, 1e-300))
    logarithms = np.log2(np.maximum(errors, max(least, 1e-300)))
    counted = errors > 0
    whole = _mean(logarithms, counted, None, floor)
    by_row, by_column = _mean(logarithms, counted, 1, floor), _mean(logarithms, counted, 0, floor)
    relative = _mean(logarithms - by_row[:, None], counted, 0, -np.inf)
    apart = CODE_BITS / np.array([columns, rows])
    alike, same = np.zeros(columns), np.broadcast_to(whole, (rows,))
    options = [  # expected bits an entry, but for what is the same in all four
        (_price(logarithms, counted, same, alike), same, alike),
        (_price(logarithms, counted, by_row, alike) + apart[0], by_row, alike),
        (_price(logarithms, counted, same, by_column - whole) + apart[1], same, by_column - whole),
        (_price(logarithms, counted, by_row, relative) + apart.sum(), by_row, relative),
    ]
    _, row_scales, column_scales = min(options, key=lambda option: option[0])
    return np.rint(4 * row_scales).astype(np.int64), np.rint(4 * column_scales).astype(np.int64)


def _mean(values: Floats, counted: NDArray[np.bool_], axis: int | None, floor: float) -> Floats:
    """Mean of the counted values; of all where none is, or it is so near ``floor`` that the others are like them."""
    number = counted.sum(axis)
    mean = np.where(counted, values, 0.0).sum(axis) / np.maximum(number, 1)
    chosen: Floats = np.where((number == 0) | (mean < floor + _FINE), values.mean(axis), mean)
    return chosen


def _price(logarithms: Floats, counted: NDArray[np.bool_], rows: Floats, columns: Floats) -> float:
    """Bits an entry lost to errors that are not of their expected size: about a quarter of the squared distance."""
    distance = np.where(counted, logarithms - rows[:, None] - columns[None, :], 0.0)
    return float(np.square(distance).mean()) / 4
