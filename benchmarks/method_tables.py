"""The measured part of ``docs/methods.md``: accuracy on the suites, time and memory, from the JSON in ``results/``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from tables import load, percent, row, source

SUITES = {
    "text8": "eight MiniLM-L6 text classifiers",
    "vision6": "six EfficientNet-Lite0 image classifiers (convolutions and BatchNorm)",
}

Entry = Mapping[str, object]

FINDINGS = Path(__file__).resolve().parent.parent / "docs" / "findings.md"
"""Text with ``{suite:method:variant:mean}`` and the like where a measured share in percent belongs."""


def findings() -> str:
    """The text with its numbers put in; a dash where one was not measured."""
    return re.sub(r"\{(\w+):([^:{}]+):(\w+):(\w+)\}", _number, FINDINGS.read_text(encoding="utf-8"))


def _number(place: re.Match[str]) -> str:
    suite, method, variant, key = place.groups()
    methods = cast("dict[str, dict[str, Entry]]", (load(f"methods-{suite}") or {}).get("methods", {}))
    value = methods.get(method, {}).get(variant, {}).get(key)
    return "-" if value is None else f"{value:g}" if key == "alpha" else percent(value)


def methods_tables() -> str:
    """One table a suite, then time and memory; empty where nothing was measured."""
    parts = [_accuracy(suite, what) for suite, what in SUITES.items()]
    parts += [_cost(), _exactness(), _authors()]
    measured = "\n".join(part for part in parts if part)
    return f"\n## Measured\n\n{_HEAD}\n{measured}" if measured else ""


_HEAD = """\
Accuracy of the merged checkpoint alone, each task with its own head: share of the experts' own accuracy in percent,
mean over tasks and worst task. `auto` chose alpha by agreement with the experts on 64 unlabelled held-out inputs
a task (where BatchNorm is re-estimated, from 64 inputs a task, with it). Test rows are drawn at random. Seconds (s) are
of the whole `retex merge` process at the default.
"""


def _accuracy(suite: str, what: str) -> str:
    name = f"methods-{suite}"
    result = load(name)
    if result is None:
        return ""
    methods = cast("dict[str, dict[str, Entry]]", result["methods"])
    rows, base = cast("dict[str, int]", result["test_rows"]), cast("Entry", result["base"])
    kinds = [kind for kind in _VARIANTS if any(kind in variants for variants in methods.values())]
    best = "batchnorm" if "batchnorm" in kinds else "default"
    text = f"### {suite}: {what}, at most {max(rows.values()):,} test rows a task\n\n"
    text += row(["method", *(_VARIANTS[kind] for kind in kinds), "alpha by auto", "s"]) + "|---" * (len(kinds) + 3)
    text += "|\n" + row(["(the base, nothing merged)", _pair(base), *[""] * (len(kinds) + 1)])
    for method, variants in sorted(methods.items(), key=lambda item: -cast("float", item[1][best]["mean"])):
        alpha = f"{variants['auto']['alpha']:g}" if "auto" in variants else ""
        seconds = f"{variants['default']['wall_s']:.1f}"
        text += row([method, *(_pair(variants.get(kind)) for kind in kinds), alpha, seconds])
    return text + "\n" + source(name, result) + "\n"


_VARIANTS = {
    "default": "default: mean / worst",
    "batchnorm": "BatchNorm re-estimated: mean / worst",
    "auto": "auto: mean / worst",
}


def _pair(entry: Entry | None) -> str:
    return "" if entry is None else f"{percent(entry['mean'])} / {percent(entry['worst'])}"


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


def _exactness() -> str:
    """The same merges by mergekit and peft: one row per method, the worst entry per type."""
    name = "exactness"
    result = load(name)
    if result is None:
        return ""
    rows, peers, shapes = result["rows"], result["peers"], result["shapes"]
    assert isinstance(rows, list)
    assert isinstance(peers, list)
    assert isinstance(shapes, list)
    kinds = list(dict.fromkeys(entry["dtype"] for entry in rows))
    text = (
        f"### The same tensors as {' and '.join(peers)} (with its peft)\n\n`retex merge --config` on mergekit's own "
        f"files, small models of the shapes {', '.join(shapes)}: the largest difference of an entry, "
        "relative to the largest of the tensor's task vectors, outside of ties at a threshold; in brackets the share "
        "of all entries that differ by more than rounding.\n\n"
    )
    text += row(["peer", "method", *kinds, "where they differ"]) + "|---" * (3 + len(kinds)) + "|\n"
    for peer, method in dict.fromkeys((entry["peer"], entry["method"]) for entry in rows):
        mine = {entry["dtype"]: entry for entry in rows if (entry["peer"], entry["method"]) == (peer, method)}
        note = max((entry["note"] for entry in mine.values()), key=len)
        text += row([peer, method, *(_difference(mine.get(kind)) for kind in kinds), note])
    return text + "\n" + source(name, result) + "\n"


def _authors() -> str:
    """The same merges by the released code of the methods' authors: one row per method."""
    result = load("authors")
    if result is None:
        return ""
    rows = result["rows"]
    assert isinstance(rows, list)
    text = (
        "### The same tensors as the authors' released code\n\nTheir functions, run from their files, and retex on a "
        "small float32 model: the largest difference of an entry, relative to the largest of the tensor's merged task "
        "vector, with their code in float32 and in float64; in brackets the share of all entries that differ by more "
        "than rounding. Where their code as released follows another rule, it was run as the last column says, and "
        "`as released` is how far its own merge lies from retex's, in percent of its task vector's norm.\n\n"
    )
    text += row(["method", "their code", "float32", "float64", "as released", "where they differ"]) + "|---" * 6 + "|\n"
    for entry in rows:
        place = f"{entry['repository']}@{entry['commit'][:10]}<br>`{entry['file']}`"
        released = f"{100 * entry['released']:.2g} %" if "released" in entry else ""
        worst = [_difference(entry[dtype]) for dtype in ("float32", "float64")]
        text += row([entry["method"], place, *worst, released, entry["note"]])
    return text + "\n" + source("authors", result) + "\n"


def _difference(row: dict[str, object] | None) -> str:
    if row is None:
        return ""
    worst, beyond = row["worst"], row.get("beyond", 0.0)
    assert isinstance(worst, float)
    assert isinstance(beyond, float)
    text = "0" if worst == 0 else f"{worst:.0e}"
    return f"{text} ({100 * beyond:.2g} %)" if beyond else text
