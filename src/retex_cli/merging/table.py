"""METHODS: every way to merge that retex knows, in one visible table. Imports no numerical library.

One row is one method: its name on the command line, its paper, its options with the paper's defaults, and the place of
the function that computes it (``"sparse:ties"`` is ``retex_cli.merging.sparse.ties``), imported when it is first used.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

from retex_cli.errors import UsageError

Value = float | int | str | bool


@dataclass(frozen=True, slots=True)
class Option:
    """One setting of a method: its default is the paper's, its type is the default's."""

    name: str
    default: Value
    help: str
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()

    def parse(self, value: object, method: str) -> Value:
        """``value`` (from a flag, a file or a caller) as this option's type; ``UsageError`` if it cannot be meant."""
        place = f"option {self.name!r} of method {method!r}"
        if self.choices:
            if value not in self.choices:
                raise UsageError(f"{place} is {value!r}", f"it can be {', '.join(self.choices)}")
            return str(value)
        if isinstance(self.default, bool):
            return _parse_bool(value, place)
        if isinstance(self.default, str):
            return str(value)
        return self._parse_number(value, place)

    def _parse_number(self, value: object, place: str) -> float | int:
        try:
            if isinstance(value, bool) or not isinstance(value, int | float | str):
                raise ValueError
            number = float(value)
        except ValueError:
            raise UsageError(f"{place} is {value!r}", "it must be a number") from None
        if not math.isfinite(number) or not self.low <= number <= self.high:
            raise UsageError(f"{place} is {value!r}", f"it must lie between {self.low:g} and {self.high:g}")
        if isinstance(self.default, int):
            if number != int(number):
                raise UsageError(f"{place} is {value!r}", "it must be a whole number")
            return int(number)
        return number


def _parse_bool(value: object, place: str) -> bool:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    answer = words.get(str(value).lower())
    if answer is None:
        raise UsageError(f"{place} is {value!r}", "it must be true or false")
    return answer


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the table.

    ``granularity`` says how much must be in memory at once: "element" a block of elements, "rows" a block of whole
    rows, "tensor" one tensor of every expert. ``survey`` is the place of an optional function that looks at all tensors
    before the first is merged (for thresholds over the whole model).
    """

    name: str
    title: str
    paper: str
    where: str
    options: tuple[Option, ...] = ()
    granularity: Literal["element", "rows", "tensor"] = "element"
    needs: Literal["nothing", "two experts", "inputs"] = "nothing"
    survey: str = ""

    @property
    def link(self) -> str:
        """Where the paper is."""
        return f"https://arxiv.org/abs/{self.paper}" if self.paper[:4].isdigit() else self.paper

    def function(self) -> object:
        """The function that merges one tensor; importing it imports torch."""
        return _load(self.where)

    def survey_function(self) -> object | None:
        """The function that looks at every tensor first, or None."""
        return _load(self.survey) if self.survey else None

    def resolve(self, given: Mapping[str, object]) -> dict[str, Value]:
        """All options of this method: those ``given``, checked, and the paper's defaults for the others."""
        known = {option.name: option for option in self.options}
        for name in given:
            if name not in known:
                raise UsageError(
                    f"method {self.name!r} has no option {name!r}",
                    suggest(name, known) or f"it takes {', '.join(known) or 'no options'}",
                )
        return {name: o.parse(given[name], self.name) if name in given else o.default for name, o in known.items()}


def _load(where: str) -> object:
    module, _, name = where.partition(":")
    return getattr(import_module(f"retex_cli.merging.{module}"), name)


def suggest(name: str, known: Collection[str]) -> str | None:
    """ "did you mean ...?" for the closest of ``known``, or None if nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else None


def find_method(name: str) -> Method:
    """The row called ``name``; ``UsageError`` with the closest names otherwise."""
    if name not in METHODS:
        raise UsageError(
            f"unknown merge method {name!r}", suggest(name, METHODS) or f"methods are {', '.join(METHODS)}"
        )
    return METHODS[name]


def options_for(
    method: Method, name: str, options: Mapping[str, object], overrides: Mapping[str, Mapping[str, object]]
) -> dict[str, Value]:
    """The options with which tensor ``name`` is merged: overrides whose glob matches it apply in the order given."""
    given = dict(options)
    for pattern, extra in overrides.items():
        if fnmatch.fnmatchcase(name, pattern):
            given.update(extra)
    return method.resolve(given)


_ALPHA = "how much of the merged task vector is added to the base"
_DENSITY = "share of each task vector's entries that is kept"

_ROWS = (
    Method("average", "Plain average of the experts", "2203.05482", "linear:average"),
    Method(
        "task_arithmetic",
        "Task arithmetic: base plus the scaled sum of task vectors",
        "2212.04089",
        "linear:task_arithmetic",
        (Option("alpha", 0.4, _ALPHA),),
    ),
    Method(
        "ties",
        "TIES: trim, elect signs, disjoint mean",
        "2306.01708",
        "sparse:ties",
        (
            Option("density", 0.2, _DENSITY, 0.0, 1.0),
            Option("alpha", 1.0, _ALPHA),
            Option("scope", "global", "where the largest entries are chosen", choices=("global", "tensor")),
        ),
        survey="sparse:ties_survey",
    ),
    Method(
        "dare",
        "DARE: drop entries at random, rescale, then task arithmetic",
        "2311.03099",
        "sparse:dare",
        (Option("density", 0.1, _DENSITY, 1e-6, 1.0), Option("alpha", 0.4, _ALPHA)),
    ),
    Method(
        "dare_ties",
        "DARE, then the sign election and disjoint mean of TIES",
        "2311.03099",
        "sparse:dare_ties",
        (Option("density", 0.1, _DENSITY, 1e-6, 1.0), Option("alpha", 1.0, _ALPHA)),
    ),
)

METHODS: Mapping[str, Method] = {row.name: row for row in _ROWS}
