"""Options of merge methods: their defaults, their types, and what is refused. Imports no numerical library."""

from __future__ import annotations

import math
from dataclasses import dataclass

from retex_cli.errors import UsageError

Value = float | int | str | bool


@dataclass(frozen=True, slots=True)
class Option:
    """One setting of a method: its default is the paper's, its type the default's (a number where that is a word)."""

    name: str
    default: Value
    help: str
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    """Words that may stand for the number."""

    def parse(self, value: object, method: str) -> Value:
        """``value`` (from a flag, a file or a caller) as this option's type; ``UsageError`` if it cannot be meant."""
        place = f"option {self.name!r} of method {method!r}"
        if self.choices:
            if value not in self.choices:
                raise UsageError(f"{place} is {value!r}", f"it can be {', '.join(self.choices)}")
            return str(value)
        if isinstance(self.default, bool):
            return _parse_bool(value, place)
        if value in self.words:
            return str(value)
        return self._parse_number(value, place)

    def _parse_number(self, value: object, place: str) -> float | int:
        try:
            if isinstance(value, bool) or not isinstance(value, int | float | str):
                raise ValueError
            number = float(value)
        except ValueError:
            words = "".join(f" or {word}" for word in self.words)
            raise UsageError(f"{place} is {value!r}", f"it must be a number{words}") from None
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
