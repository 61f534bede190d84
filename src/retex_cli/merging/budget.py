"""How much memory a merge needs: what is under way at once, in bytes, from shapes alone."""

from __future__ import annotations

import os
from collections.abc import Iterable

from retex_cli.merging.matrices import CELL_ELEMENTS
from retex_cli.merging.table import Method
from retex_cli.merging.view import BLOCK_ELEMENTS, GRID, View

DEFAULT = 1 << 27
"""Bytes under way where nobody says: blocks and finished pieces; more where a method needs more."""
GROUP_ELEMENTS = 1 << 19
"""Elements of output that a worker makes in one go."""


def default_threads() -> int:
    """One worker per core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def first_pass_bytes(method: Method, view: View) -> int:
    """What the first passes over one tensor hold, beyond a block."""
    tasks = len(view.tasks)
    if method.granularity == "element" or len(view.shape) < 2 or view.row == 0:
        return 0
    rows, columns = view.numel // view.row, view.row
    short = min(rows, columns)
    statistics = 40 * max(rows, columns) ** 2 if view.statistics else 0
    if method.granularity == "tensor":
        return 4 * (2 * tasks + 8) * view.numel + statistics
    held = 4 * (tasks + 2) * view.numel if rows <= columns else 0
    return 16 * (tasks + 4) * short * short + 24 * tasks * max(CELL_ELEMENTS, short) + held


def block_bytes(views: Iterable[View], threads: int) -> int:
    """Every worker's block of all inputs and the piece of output that it makes."""
    widest = max((len(view.experts) + 1 for view in views), default=1)
    return threads * 4 * (max(BLOCK_ELEMENTS, widest * GRID) + GROUP_ELEMENTS)


def least(method: Method, views: list[View], threads: int | None) -> int:
    """The smallest budget with which a merge is possible: the blocks, and the largest tensor's first passes."""
    needs = [first_pass_bytes(method, view) for view in views]
    return block_bytes(views, threads or default_threads()) + max(needs, default=0)


def usual(method: Method, views: list[View], threads: int | None) -> int:
    """The budget where nobody gives one: every worker on one of the largest tensors."""
    workers = threads or default_threads()
    needs = sorted((first_pass_bytes(method, view) for view in views), reverse=True)
    return max(DEFAULT, block_bytes(views, workers) + sum(needs[:workers]))
