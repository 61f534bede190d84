"""How a tensor is cut where offsets are added to it: all who recover it cut alike, and so get the same bits."""

from __future__ import annotations

import math

import torch

Span = tuple[int, int]

BLOCK = 1 << 19
"""Entries that a processor works on together: memory stays flat, and blocks fit where they are used."""
ON_DEVICE = 1 << 22
"""The same elsewhere, where a launch costs more than memory."""


def columns_of(shape: tuple[int, ...]) -> int:
    """Entries of a row of ``d_out x rest``; vectors and scalars are one row."""
    return math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)


def row_blocks(rows: int, columns: int, size: int) -> list[Span]:
    """Runs of whole rows of about ``size`` entries, at least one row each; none of an empty matrix."""
    step = max(1, size // max(columns, 1))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)] if columns else []


def spans(shape: tuple[int, ...], device: torch.device) -> list[Span]:
    """A tensor's elements in runs: whole rows, or parts of one where a row is longer than a block."""
    columns, numel, size = columns_of(shape), math.prod(shape), BLOCK if device.type == "cpu" else ON_DEVICE
    if columns <= size:
        rows = numel // columns if columns else 0
        return [(start * columns, stop * columns) for start, stop in row_blocks(rows, columns, size)]
    return [
        (start, min(start + size, row + columns))
        for row in range(0, numel, columns)
        for start in range(row, row + columns, size)
    ]
