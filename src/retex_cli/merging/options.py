"""Options of merge methods: their defaults, their types, and what is refused. Imports no numerical library."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from retex_cli.errors import UsageError

OTHERS = "*"
"""In a mapping of tasks to numbers: the tasks that it does not name."""


@dataclass(frozen=True, slots=True)
class PerTask:
    """A number per task: the ``given`` ones by name, ``others`` for those that are not named."""

    given: tuple[tuple[str, float], ...]
    others: float

    def of(self, task: str) -> float:
        """The number of one task."""
        return dict(self.given).get(task, self.others)


Value = float | int | str | bool | PerTask
Number = float | PerTask
"""What an option holds that may differ between tasks."""


def each(value: Number, tasks: Sequence[str]) -> tuple[float, ...]:
    """One number per task, in the order of ``tasks``."""
    return tuple(value.of(task) if isinstance(value, PerTask) else value for task in tasks)


def plain(options: Mapping[str, Value], tasks: Sequence[str]) -> dict[str, object]:
    """The options as JSON has them: what differs between tasks as ``{task: number}``."""
    return {
        name: dict(zip(tasks, each(value, tasks), strict=True)) if isinstance(value, PerTask) else value
        for name, value in options.items()
    }


@dataclass(frozen=True, slots=True)
class Option:
    """One setting of a method: its default is the paper's, its type the default's (a number where that is a word).

    ``words`` may stand for the number. ``per_task``: instead of one number it takes a mapping of task names to numbers
    too, with ``"*"`` for the others.
    """

    name: str
    default: Value
    help: str
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    per_task: bool = False

    def parse(self, value: object, method: str) -> Value:
        """``value`` (from a flag, a file or a caller) as this option's type; ``UsageError`` if it cannot be meant."""
        place = f"option {self.name!r} of method {method!r}"
        if isinstance(value, PerTask):
            value = {OTHERS: value.others, **dict(value.given)}
        if self.per_task and isinstance(value, Mapping):
            return self._parse_tasks(value, place)
        if self.choices:
            if value not in self.choices:
                raise UsageError(f"{place} is {value!r}", f"it can be {', '.join(self.choices)}")
            return str(value)
        if isinstance(self.default, bool):
            return _parse_bool(value, place)
        if value in self.words:
            return str(value)
        return self._parse_number(value, place)

    def _parse_tasks(self, value: Mapping[object, object], place: str) -> PerTask:
        numbers = {str(task): self._parse_number(number, f"{place} for {task!r}") for task, number in value.items()}
        others = numbers.pop(OTHERS, self.default)
        assert isinstance(others, int | float)
        return PerTask(tuple(sorted(numbers.items())), others)

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


def unknown_task(options: Mapping[str, Value], tasks: Collection[str]) -> tuple[str, str] | None:
    """The first option that names a task which is not among ``tasks``, and the name; None if there is none."""
    for name, value in options.items():
        for task, _ in value.given if isinstance(value, PerTask) else ():
            if task not in tasks:
                return name, task
    return None
