"""How much memory a merge needs: what is under way at once, in bytes, from shapes alone.

A budget is split three ways. Every worker has its blocks of all inputs, with what is computed from one. What is left
goes to finished pieces that wait to be written, and to first passes over tensors with what they leave behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from retex_cli.merging.matrices import CELL_ELEMENTS
from retex_cli.merging.table import Method
from retex_cli.merging.view import GRID, View

DEFAULT = 3 << 25
"""Bytes for first passes where nobody says (100 MB); more where a method needs more."""
SMALL_BLOCKS = (1 << 19, 1 << 18)
"""Elements of all inputs in a block where the budget has no room for the usual one; each costs speed."""
GROUP_ELEMENTS = 1 << 19
"""Elements of output that a worker makes in one go."""
WAITING = 8
"""Finished pieces per worker that may wait for their turn to be written."""
COPIES = {"element": 8, "rows": 3, "tensor": 3}
"""What arithmetic on a block takes at most, as copies of the block, itself among them; della takes most."""
LIBRARY = 8 << 20
"""Bytes that libraries for linear algebra keep for themselves, for each worker."""
FIXED = 6 << 20
"""Bytes of whatever does not grow: file buffers, stacks, a few small tensors."""
COLLECTED = 6
"""Bytes per value that the selection of order statistics collects, with room to gather them."""


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


def kept_bytes(method: Method, view: View) -> int:
    """What of that is left until the tensor is written: the merged task vector, or the small factors of a tall one."""
    if first_pass_bytes(method, view) == 0:
        return 0
    rows, columns = view.numel // view.row, view.row
    return 4 * view.numel if method.granularity == "tensor" or rows < columns else 16 * columns * columns


def block_bytes(method: Method, views: Sequence[View], threads: int) -> int:
    """Every worker's block of all inputs, what is computed from it, and the piece of output that it makes."""
    largest = max((_block_elements(method, view) for view in views), default=0)
    library = 0 if method.granularity == "element" else LIBRARY
    return FIXED + threads * (4 * (COPIES[method.granularity] * largest + GROUP_ELEMENTS) + library)


def _block_elements(method: Method, view: View) -> int:
    inputs = len(view.experts) + 1
    row = view.row if len(view.shape) > 1 else 0
    least = GRID if method.granularity == "element" else CELL_ELEMENTS
    return inputs * min(max(view.block_length(), least, row), view.numel)


def fitted(method: Method, views: Sequence[View], threads: int, budget: int) -> list[View]:
    """The views with the largest blocks that the budget has room for, or with the smallest."""
    for block in (None, *SMALL_BLOCKS):
        found = [replace(view, block=block) for view in views]
        if block_bytes(method, found, threads) + _largest_pass(method, found) <= budget:
            break
    return found


def _largest_pass(method: Method, views: Sequence[View]) -> int:
    return max((first_pass_bytes(method, view) for view in views), default=0)


@dataclass(frozen=True)
class Shares:
    """Bytes for finished pieces, for first passes, and how many values one selection may collect of a tensor alone,
    and of all tensors before the first is merged."""

    finished: int
    ahead: int
    values: int
    surveyed_values: int


def split(method: Method, views: Sequence[View], threads: int, budget: int) -> Shares:
    """What of a budget goes where; a budget below ``least`` gets the smallest shares that work."""
    free = max(0, budget - block_bytes(method, views, threads))
    finished = min(_waiting_bytes(threads), max(0, free - _largest_pass(method, views)) // 4)
    ahead = free - finished
    return Shares(finished, ahead, max(GRID, ahead // (COLLECTED * threads)), max(GRID, free // COLLECTED))


def _waiting_bytes(threads: int) -> int:
    return threads * WAITING * 4 * GROUP_ELEMENTS


def least(method: Method, views: Sequence[View], threads: int) -> int:
    """The smallest budget with which a merge is possible: small blocks, and the largest tensor's first passes."""
    smallest = [replace(view, block=SMALL_BLOCKS[-1]) for view in views]
    return block_bytes(method, smallest, threads) + _largest_pass(method, smallest)


def usual(method: Method, views: Sequence[View], threads: int) -> int:
    """The budget where nobody gives one: every worker on one of the largest tensors, and none waits to write."""
    needs = sorted((first_pass_bytes(method, view) for view in views), reverse=True)
    kept = 2 * max((kept_bytes(method, view) for view in views), default=0)
    ahead = max(DEFAULT, sum(needs[:threads]) + kept)
    return block_bytes(method, views, threads) + _waiting_bytes(threads) + ahead
