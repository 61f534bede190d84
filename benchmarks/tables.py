"""The README's tables, written from the JSON in ``results/``; nothing in them is typed by hand."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def _load(name: str) -> dict[str, object] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _percent(value: object) -> str:
    return f"{100 * value:.2f}" if isinstance(value, float) else "-"


def _source(name: str, result: dict[str, object]) -> str:
    made = result["provenance"]
    assert isinstance(made, dict)
    return (
        f"<sub>`benchmarks/results/{name}.json`, commit `{str(made['commit'])[:10]}`, "
        f"{made['cores']} cores of {made['processor']}.</sub>\n"
    )


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"


def _demo(suite: str) -> str:
    """Accuracies of one suite at the default budget, all protocols."""
    name = f"eval-{suite}"
    result = _load(name)
    if result is None:
        return ""
    tasks, mean = result["tasks"], result["mean"]
    assert isinstance(tasks, dict)
    assert isinstance(mean, dict)
    text = (
        f"**{suite}**: {len(tasks)} fully fine-tuned MiniLM-L6 experts, full test sets, plain average, "
        f"offsets of {result['budget']} of an expert, {result['samples']} reference inputs. Accuracy in percent; "
        "K: task known, E: encoder identified, H: encoder and head identified.\n\n"
    )
    text += _row(["task", "expert", "merged alone", "K", "E", "H", "K / expert", "task found", "offsets"])
    text += "|---" * 9 + "|\n"
    for task, entry in tasks.items():
        recovered = [_percent(entry["recovered"][p]) for p in "KEH"]
        known = [_percent(entry["normalised"]["K"]), _percent(entry["identified"]), f"{entry['offset_bytes']:,} B"]
        text += _row([task, _percent(entry["expert"]), _percent(entry["merged"]), *recovered, *known])
    recovered = [_percent(mean["recovered"][p]) for p in "KEH"]
    known = [_percent(mean["normalised"]["K"]), _percent(mean["identified"]), ""]
    text += _row(["mean", _percent(mean["expert"]), _percent(mean["merged"]), *recovered, *known])
    worst, files = mean["worst"], result["files"]
    assert isinstance(files, dict)
    text += (
        f"\nWorst task under K: {_percent(worst['K'])} % of its expert (merged alone: {_percent(worst['merged'])} %). "
        f"All files: {sum(files.values()):,} bytes, against {sum(e['expert_bytes'] for e in tasks.values()):,} for the "
        "experts.\n\n"
    )
    return text + _source(name, result) + "\n"


def _budgets(suite: str) -> str:
    name = f"budgets-{suite}"
    result = _load(name)
    if result is None:
        return ""
    rows = result["rows"]
    assert isinstance(rows, list)
    text = f"**{suite}**, protocol K at several budgets (share of the experts' accuracy, percent):\n\n"
    text += _row(["budget", "mean", "worst task", "agreement with the expert", "merged alone"]) + "|---" * 5 + "|\n"
    for row in rows:
        mean = row["mean"]
        cells = [mean["normalised"]["K"], mean["worst"]["K"], mean["agreement"]["K"], mean["normalised"]["merged"]]
        text += _row([row["budget"], *map(_percent, cells)])
    return text + "\n" + _source(name, result) + "\n"


def _memory() -> str:
    """Merging a base and eight experts of 124 M fp32 parameters: time and anonymous memory per method."""
    name = "merge_memory"
    result = _load(name)
    if result is None:
        return ""
    text = f"**Merging** {result['what']}, whole process, beside a plain copy of the same bytes:\n\n"
    text += _row(["method", "wall s", "CPU s", "peak anonymous MB", "wall / copy"]) + "|---" * 5 + "|\n"
    copy, methods = result["copy_s"], result["methods"]
    assert isinstance(copy, float)
    assert isinstance(methods, dict)
    for method, entry in methods.items():
        wall = entry["wall_s"]
        text += _row([method, f"{wall:.1f}", f"{entry['cpu_s']:.1f}", f"{entry['anon_mb']:.0f}", f"{wall / copy:.1f}"])
    return text + f"\nThe copy took {copy:.1f} s.\n\n" + _source(name, result) + "\n"


def _exactness() -> str:
    """The same merges by mergekit and peft: one row per method, the worst entry per type."""
    name = "exactness"
    result = _load(name)
    if result is None:
        return ""
    rows, peers, shapes = result["rows"], result["peers"], result["shapes"]
    assert isinstance(rows, list)
    assert isinstance(peers, list)
    assert isinstance(shapes, list)
    kinds = list(dict.fromkeys(row["dtype"] for row in rows))
    text = (
        f"**The same tensors as {' and '.join(peers)} (with its peft)**, by `retex merge --config` on mergekit's own "
        f"files, for small models of the shapes {', '.join(shapes)}: the largest difference of an entry, relative to "
        "the largest of the tensor's task vectors, outside of ties at a threshold; in brackets the share of all "
        "entries that differ by more than rounding.\n\n"
    )
    text += _row(["peer", "method", *kinds, "where they differ"]) + "|---" * (3 + len(kinds)) + "|\n"
    for peer, method in dict.fromkeys((row["peer"], row["method"]) for row in rows):
        mine = {row["dtype"]: row for row in rows if (row["peer"], row["method"]) == (peer, method)}
        note = max((row["note"] for row in mine.values()), key=len)
        text += _row([peer, method, *(_difference(mine.get(kind)) for kind in kinds), note])
    return text + "\n" + _source(name, result) + "\n"


def _difference(row: dict[str, object] | None) -> str:
    if row is None:
        return ""
    worst, beyond = row["worst"], row.get("beyond", 0.0)
    assert isinstance(worst, float)
    assert isinstance(beyond, float)
    text = "0" if worst == 0 else f"{worst:.0e}"
    return f"{text} ({100 * beyond:.2g} %)" if beyond else text


def readme_tables() -> str:
    """Everything between the README's ``measured`` marks."""
    parts = [_demo("text4"), _demo("text8"), _budgets("text4"), _budgets("text8"), _memory(), _exactness()]
    return "\n" + "".join(parts) if any(parts) else "\nNothing measured yet: run the scripts in `benchmarks/`.\n"
