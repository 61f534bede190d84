"""The measured part of ``docs/methods.md``: accuracy on the suites, time and memory, from the JSON in ``results/``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from tables import load, percent, row, source

SUITES = {
    "text8": "eight MiniLM-L6 text classifiers",
    "vision6": "six EfficientNet-Lite0 image classifiers (convolutions and BatchNorm)",
}

Entry = Mapping[str, object]


def methods_tables() -> str:
    """One table a suite, then time and memory; empty where nothing was measured."""
    parts = [_accuracy(suite, what) for suite, what in SUITES.items()]
    parts.append(_cost())
    measured = "\n".join(part for part in parts if part)
    return f"\n## Measured\n\n{_HEAD}\n{measured}" if measured else ""


_HEAD = """\
Accuracy of the merged checkpoint alone, each task with its own head: share of the experts' own accuracy in percent,
mean over tasks and worst task. `auto` chose alpha by agreement with the experts on 64 unlabelled held-out inputs.
"""


def _accuracy(suite: str, what: str) -> str:
    name = f"methods-{suite}"
    result = load(name)
    if result is None:
        return ""
    methods = cast("dict[str, dict[str, Entry]]", result["methods"])
    rows, base = cast("dict[str, int]", result["test_rows"]), cast("Entry", result["base"])
    text = f"### {suite}: {what}, at most {max(rows.values()):,} test rows a task\n\n"
    text += row(["method", "mean", "worst task", "alpha by auto", "mean", "worst task", "seconds"]) + "|---" * 7 + "|\n"
    text += row(["(the base, nothing merged)", percent(base["mean"]), percent(base["worst"]), "", "", "", ""])
    for method, variants in sorted(methods.items(), key=lambda item: -cast("float", item[1]["default"]["mean"])):
        usual, chosen = variants["default"], variants.get("auto")
        cells = [method, percent(usual["mean"]), percent(usual["worst"])]
        if chosen is None:
            cells += ["", "", ""]
        else:
            cells += [f"{chosen['alpha']:g}", percent(chosen["mean"]), percent(chosen["worst"])]
        text += row([*cells, f"{usual['wall_s']:.1f}"])
    return text + "\nSeconds are of the whole `retex merge` process at the default.\n\n" + source(name, result) + "\n"


def _cost() -> str:
    """Time and memory on large models, where they were measured."""
    result = load("merge_speed")
    if result is None:
        return ""
    text = f"### Time and memory: {result['what']}\n\n"
    text += row(["method", "wall s", "CPU s", "peak anonymous MB"]) + "|---" * 4 + "|\n"
    for method, sides in cast("dict[str, dict[str, dict[str, float]]]", result["methods"]).items():
        ours = sides["retex"]
        text += row([method, f"{ours['wall_s']:.1f}", f"{ours['cpu_s']:.1f}", f"{ours['anon_mb']:.0f}"])
    return text + "\n" + source("merge_speed", result) + "\n"
