"""What merging must keep to, checked on what ``merge_speed.py`` measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

from retex_cli.merging.table import METHODS

TIMES_FASTER = {"ties": 10.0, "dare_ties": 5.0, "task_arithmetic": 2.0}
"""How many times less wall time than mergekit; every other method that both have: no more of it."""
ELEMENT_WISE_MB = 600.0
"""The most anonymous memory of a method that looks at one element at a time."""
SHARE_OF_MEMORY = 1 / 3
"""What any other may take of mergekit's."""
FLATNESS = 1.15
"""How much more memory any number of layers may take than the number that takes least."""

Sides = Mapping[str, Mapping[str, float]]


def ratio(sides: Sides, key: str) -> float:
    """How many times less of something retex takes than mergekit."""
    return sides["mergekit"][key] / sides["retex"][key]


def missed(result: Mapping[str, object]) -> list[str]:
    """One line for each bar that is missed; empty if none is."""
    methods = cast(Mapping[str, Sides], result.get("methods", {}))
    layers = cast(Mapping[str, Mapping[str, float]], result.get("layers", {}))
    budgets = cast(Mapping[str, Mapping[str, float]], result.get("max_memory", {}))
    return [*_speeds(methods), *_memory(methods), *_flatness(layers), *_budgets(budgets)]


def _speeds(methods: Mapping[str, Sides]) -> Iterator[str]:
    for method, sides in methods.items():
        wanted = TIMES_FASTER.get(method, 1.0)
        if "mergekit" in sides and ratio(sides, "wall_s") < wanted:
            yield f"{method}: {ratio(sides, 'wall_s'):.2f} times faster than mergekit, not {wanted:g}"


def _memory(methods: Mapping[str, Sides]) -> Iterator[str]:
    for method, sides in methods.items():
        held = sides["retex"]["anon_mb"]
        if METHODS[method.partition("_global")[0]].granularity == "element":
            if held > ELEMENT_WISE_MB:
                yield f"{method}: {held:.0f} MB of anonymous memory, not {ELEMENT_WISE_MB:.0f}"
        elif "mergekit" in sides and held > SHARE_OF_MEMORY * sides["mergekit"]["anon_mb"]:
            yield f"{method}: more than a third of mergekit's {sides['mergekit']['anon_mb']:.0f} MB"


def _flatness(layers: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    for method, held in layers.items():
        if max(held.values()) > FLATNESS * min(held.values()):
            yield f"{method}: memory grows with the number of layers: {dict(held)}"


def _budgets(budgets: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    for method, held in budgets.items():
        for budget, beyond in held.items():
            if beyond > float(budget):
                yield f"{method} --max-memory {budget}MB: {beyond:.0f} MB beyond the floor"
