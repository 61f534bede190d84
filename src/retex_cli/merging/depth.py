"""What a tensor's name says: in which numbered block it lies, and whether it is a measurement and no weight."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_BLOCK = re.compile(r"(?:^|.*?\.)(\d+)\.")


def block_of(name: str) -> tuple[str, int] | None:
    """``("encoder.layer.", 3)`` for ``encoder.layer.3.dense.weight``; None outside of numbered blocks."""
    found = _BLOCK.match(name)
    return (name[: found.start(1)], int(found[1])) if found else None


def depths(names: Iterable[str]) -> Mapping[str, float | None]:
    """Per name 0 for the first block of its stack to 1 for the last; None outside of numbered blocks.

    An encoder and a decoder are two stacks, each with a first and a last block.
    """
    places = {name: block_of(name) for name in names}
    last: dict[str, int] = {}
    for place in places.values():
        if place is not None:
            last[place[0]] = max(last.get(place[0], 0), place[1])
    return {
        name: None if place is None else place[1] / last[place[0]] if last[place[0]] else 0.0
        for name, place in places.items()
    }


def is_running_statistic(name: str) -> bool:
    """Whether a tensor is the mean or variance that a BatchNorm measured: no weight for a method to reason about."""
    return name.rpartition(".")[2] in ("running_mean", "running_var")


def kind_of(name: str) -> str:
    """The name with its numbers taken out: the same for the same tensor of every block."""
    return re.sub(r"\d+", "*", name)
