"""The choices that signatures were made with, as a value and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from retex_cli.errors import RetexError
from retex_cli.signatures.features import Layout

SCORES = ("mahalanobis", "residual")


@dataclass(frozen=True, slots=True)
class Recipe:
    """``score`` is "mahalanobis" with its ``shrinkage`` and ``own`` share (see ``gaussian``), or "residual", for which
    both are zero; ``temperature`` in units of the score; ``false_alarms`` the wanted share of known inputs that may be
    called unknown."""

    preset: str
    score: str
    layout: Layout
    shrinkage: float
    own: float
    temperature: float
    false_alarms: float

    def to_json(self) -> dict[str, object]:
        """One flat object; numbers survive JSON exactly."""
        flat = asdict(self)
        layout = flat.pop("layout")
        return {**flat, **{name: list(v) if isinstance(v, tuple) else v for name, v in layout.items()}}


def _number(record: Mapping[str, object], name: str) -> float:
    value = record[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}, expected a number")
    return float(value)


def _numbers(record: Mapping[str, object], name: str) -> tuple[float, ...]:
    values = record[name]
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{name} is {values!r}, expected a list")
    return tuple(_number({name: value}, name) for value in values)


def read_recipe(metadata: Mapping[str, object]) -> Recipe:
    """From ``Recipe.to_json``. RetexError where a field is missing, of another kind, or contradicts another."""
    try:
        layers = tuple(int(layer) for layer in _numbers(metadata, "layers"))
        count, width = int(_number(metadata, "layer_count")), int(_number(metadata, "width"))
        widths = tuple(int(entries) for entries in _numbers(metadata, "widths"))
        layout = Layout(layers, _numbers(metadata, "weights"), widths, count, width)
        score = str(metadata["score"])
        if score not in SCORES:
            raise ValueError(f"score is {score!r}, expected one of {', '.join(SCORES)}")
        if not len(widths) == len(layout.weights) == len(layers) or not all(0 <= layer < count for layer in layers):
            raise ValueError(f"layers {list(layers)} of {count}, {len(layout.weights)} weights, {len(widths)} widths")
        if not layers or not all(0 < entries <= width for entries in widths):
            raise ValueError(f"layers {list(layers)} of widths {list(widths)}, at most {width}")
        numbers = {name: _number(metadata, name) for name in ("shrinkage", "own", "temperature", "false_alarms")}
        if numbers["temperature"] <= 0:
            raise ValueError(f"temperature is {numbers['temperature']}")
        return Recipe(preset=str(metadata["preset"]), score=score, layout=layout, **numbers)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(error) from error


def read_recognised(metadata: Mapping[str, object]) -> dict[str, float]:
    """Task names, sorted, with their recognised shares."""
    try:
        tasks = metadata["tasks"]
        if not isinstance(tasks, Mapping) or not tasks:
            raise TypeError(f"tasks is {tasks!r}, expected an object")
        return {str(task): _number(tasks[task], "recognised") for task in sorted(tasks)}
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(error) from error


def _damaged(error: Exception) -> RetexError:
    reason = f"no {error}" if isinstance(error, KeyError) else str(error)
    return RetexError(f"signatures: damaged recipe: {reason}", "Build the signatures again.")
