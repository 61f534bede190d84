"""The table and the picture of ``pareto.py``: accuracy against bytes, and where a rival lies above retex."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import cast

from tables import load, percent, row, source

NAME = "pareto"
DOCS = Path(__file__).resolve().parent.parent / "docs"
ALONE = "merged"

Entry = dict[str, object]


def is_ours(entry: Entry) -> bool:
    """retex itself, in any of its rows."""
    return str(entry["form"]) in ("retex", "retex-refine")


def number(entry: Entry, key: str) -> float:
    """One of an entry's numbers."""
    return float(cast("float", entry[key]))


def above(rival: Entry, entries: Sequence[Entry]) -> str:
    """Where a rival lies above retex, in words: no row of ours is as small and as good. Empty where it does not."""
    if is_ours(rival) or rival["form"] == ALONE:
        return ""
    smaller = [entry for entry in entries if is_ours(entry) and number(entry, "fraction") <= number(rival, "fraction")]
    best = max(smaller, key=lambda entry: number(entry, "mean"), default=None)
    if best is None:
        return "smaller than any of ours"
    if number(rival, "mean") <= number(best, "mean"):
        return ""
    inside = number(rival, "mean") <= cast("list[float]", best["interval"])[1]
    return "above retex, inside its interval" if inside else "**above retex**"


def suites() -> dict[str, list[Entry]]:
    """The measured rows of every suite, merge and seed, by name."""
    result = load(NAME) or {}
    return {suite: cast("list[Entry]", rows) for suite, rows in result.items() if suite != "provenance"}


def pareto_tables() -> str:
    """A table for every suite that was measured, with its picture where there are rivals in it."""
    result = load(NAME)
    if result is None:
        return "\nNothing measured yet: run `benchmarks/pareto.py text8` and `vision6`.\n"
    parts = [_table(suite, rows) for suite, rows in suites().items() if _rivals(rows)]
    parts += [_elsewhere(suite) for suite, rows in suites().items() if _rivals(rows)]
    return "\n" + _HEAD + "\n" + "\n".join(filter(None, parts)) + "\n" + _source(result, suites().values())


def ours_table() -> str:
    """For the README: retex alone, beside the best rival of at most twice the size."""
    result = load(NAME)
    if result is None:
        return ""
    text = (
        "**Accuracy against bytes**: full test sets, task and head known, share of the experts' own accuracy in "
        "percent; in brackets 95 % of bootstrap samples. Sizes are bytes of a task on average, shared out by need; the "
        "last column has the best of other forms within twice the bytes ([docs/offsets.md](docs/offsets.md)). "
        "The merge is the plain average where none is named.\n\n"
    )
    pictures = [suite for suite, rows in suites().items() if _rivals(rows)]
    text += "".join(f"![{suite}: accuracy against bytes](docs/{picture(suite)})\n" for suite in pictures) + "\n"
    text += row(["suite", "", "% of an expert", "mean", "worst task", "agreement", "others within twice the bytes"])
    text += "|---" * 7 + "|\n"
    shown = [
        (suite, rows, entry)
        for suite, rows in suites().items()
        for entry in sorted(rows, key=lambda entry: (str(entry["form"]), number(entry, "fraction")))
        if _in_readme(suite, rows, entry)
    ]
    for suite, rows, entry in shown:
        how = "`--refine`" if entry["form"] == "retex-refine" else "data-free"
        fraction = number(entry, "fraction")
        shares = [_with_interval(entry, "mean", "interval"), _with_interval(entry, "worst", "worst_interval")]
        others = _best_within(2 * fraction, rows)
        text += row([suite, how, f"{100 * fraction:.3g}", *shares, percent(entry["agreement"]), others])
    return text + "\n" + _source(result, [[entry for *_, entry in shown]]) + "\n"


def _in_readme(suite: str, rows: Sequence[Entry], entry: Entry) -> bool:
    """Our rows of suites with rivals, and the refined ones on other merges."""
    return is_ours(entry) and (bool(_rivals(rows)) or (" on " in suite and entry["form"] == "retex-refine"))


def _source(result: dict[str, object], parts: Iterable[Sequence[Entry]]) -> str:
    """Where rows come from: each may be of another run, on another machine."""
    entries = [entry for rows in parts for entry in rows]
    commits = sorted({str(entry["commit"])[:10] for entry in entries if "commit" in entry})
    return source(NAME, result, commits, sorted({str(entry["processor"]) for entry in entries if "processor" in entry}))


def _rivals(rows: Sequence[Entry]) -> list[Entry]:
    return [entry for entry in rows if not is_ours(entry) and entry["form"] != ALONE]


def _best_within(fraction: float, rows: Sequence[Entry]) -> str:
    smaller = [entry for entry in _rivals(rows) if number(entry, "fraction") <= fraction]
    if not smaller:
        return "-" if not _rivals(rows) else "none is as small"
    best = max(smaller, key=lambda entry: number(entry, "mean"))
    return f"{percent(best['mean'])} ({best['form']}, {100 * number(best, 'fraction'):.3g} %)"


def _with_interval(entry: Entry, key: str, interval: str) -> str:
    low, high = cast("list[float]", entry[interval])
    return f"{percent(entry[key])} [{percent(low)}, {percent(high)}]"


_HEAD = """\
Accuracy against bytes of files: share of the experts' own accuracy in percent, task and head known; brackets hold 95 %
of bootstrap samples of the test rows. "%" is of the fp32 bytes of an expert's shared tensors. Rivals compress what
retex does, the offsets from the merged checkpoint, unless the last column says otherwise.
"""


def _table(suite: str, entries: Sequence[Entry]) -> str:
    text = f"### {suite}\n\n"
    if _rivals(entries):
        text += f"![accuracy against bytes]({picture(suite)})\n\n"
    text += row(["form", "size", "bytes a task", "%", "mean", "worst task", "agreement", ""]) + "|---" * 8 + "|\n"
    for entry in sorted(entries, key=lambda entry: number(entry, "bytes_per_task")):
        remarks = filter(None, [above(entry, entries), str(entry.get("note", ""))])
        name = f"**{entry['form']}**" if is_ours(entry) else str(entry["form"])
        text += row(
            [
                name,
                str(entry["size"]),
                f"{number(entry, 'bytes_per_task'):,.0f}",
                f"{100 * number(entry, 'fraction'):.3g}",
                _with_interval(entry, "mean", "interval"),
                percent(entry["worst"]),
                percent(entry["agreement"]),
                "; ".join(remarks),
            ]
        )
    return text


def _elsewhere(suite: str) -> str:
    """retex on other merges and fine-tuning seeds of a suite beside the plain average of the first; empty without."""
    named = {key: rows for key, rows in suites().items() if key == suite or key.startswith((f"{suite} ", f"{suite}-"))}
    if len(named) < 2:
        return ""
    measured = {key: {(str(e["form"]), str(e["size"])): e for e in rows} for key, rows in named.items()}
    others = [key for key in named if key != suite]
    wanted = sorted({place for key in others for place in measured[key]}, key=lambda place: place[::-1])
    seeds = [key for key in named if not key.startswith(f"{suite} ")]
    columns = ["plain average, seed 0", *(key.removeprefix(suite).strip(" -") for key in others)]
    text = f"### {suite}: other merges and fine-tuning seeds\n\nMean and worst task."
    if len(seeds) > 1:
        columns.append("over seeds")
        text += " Over seeds: mean and standard deviation of both."
    text += "\n\n"
    text += row(["form", "size", *columns]) + "|---" * (2 + len(columns)) + "|\n"
    for form, size in wanted:
        cells = [measured[key].get((form, size)) for key in (suite, *others)]
        shares = [f"{_with_interval(e, 'mean', 'interval')}, {percent(e['worst'])}" if e else "-" for e in cells]
        if len(seeds) > 1:
            shares.append(_over([e for key in seeds if (e := measured[key].get((form, size)))]))
        text += row([f"**{form}**" if form != ALONE else form, size, *shares])
    return text


def _over(seeds: Sequence[Entry]) -> str:
    """The spread of a row over fine-tuning seeds, and how many there are."""
    if len(seeds) < 2:
        return "-"
    shares = [[number(entry, key) for entry in seeds] for key in ("mean", "worst")]
    return ", ".join(f"{percent(mean(each))} ± {percent(stdev(each))}" for each in shares) + f" ({len(seeds)})"


def picture(suite: str) -> str:
    """The file of a suite's picture, in ``docs/``."""
    return f"pareto-{re.sub('[^A-Za-z0-9]+', '-', suite)}.svg"


def plot(suite: str, entries: Sequence[Entry]) -> Path:
    """``docs/pareto-SUITE.svg``, the same bytes for the same entries."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "retex"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for form in dict.fromkeys(str(entry["form"]) for entry in entries):
        mine = sorted((entry for entry in entries if entry["form"] == form), key=lambda e: number(e, "fraction"))
        means = [100 * number(entry, "mean") for entry in mine]
        if form == ALONE:
            axes.axhline(means[0], color="grey", linestyle=":", label="merged alone")
            continue
        style = {"linewidth": 3, "zorder": 3} if is_ours(mine[0]) else {"linewidth": 1, "alpha": 0.8}
        axes.plot([100 * number(entry, "fraction") for entry in mine], means, marker="o", label=form, **style)
    axes.set(
        xscale="log", xlabel="bytes a task, % of the fp32 expert", ylabel="% of the expert's accuracy", title=suite
    )
    axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    path = DOCS / picture(suite)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path
