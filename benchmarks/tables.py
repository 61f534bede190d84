"""The README's tables, written from the JSON in ``results/``; nothing in them is typed by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def load(name: str) -> dict[str, object] | None:
    """``results/NAME.json``, or None where it was not measured yet."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def percent(value: object) -> str:
    """A share in percent, two digits."""
    return f"{100 * value:.2f}" if isinstance(value, float) else "-"


def source(name: str, result: dict[str, object], commits: Iterable[str] = (), processors: Iterable[str] = ()) -> str:
    """Where a table comes from: a run, or rows that were measured at ``commits``, on ``processors``."""
    made = result["provenance"]
    assert isinstance(made, dict)
    found = list(dict.fromkeys(commits)) or [str(made["commit"])]
    named = ("commit " if len(found) == 1 else "commits ") + ", ".join(f"`{commit[:10]}`" for commit in found)
    machines = " or ".join(dict.fromkeys(processors)) or str(made["processor"])
    return f"<sub>`benchmarks/results/{name}.json`, {named}, {made['cores']} cores of {machines}.</sub>\n"


def row(cells: list[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cells) + " |\n"


def _demo(suite: str) -> str:
    """Accuracies of one suite at the default budget, all protocols."""
    name = f"eval-{suite}"
    result = load(name)
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
    text += row(["task", "expert", "merged alone", "K", "E", "H", "K / expert", "task found", "offsets"])
    text += "|---" * 9 + "|\n"
    for task, entry in tasks.items():
        recovered = [percent(entry["recovered"][p]) for p in "KEH"]
        known = [percent(entry["normalised"]["K"]), percent(entry["identified"]), f"{entry['offset_bytes']:,} B"]
        text += row([task, percent(entry["expert"]), percent(entry["merged"]), *recovered, *known])
    recovered = [percent(mean["recovered"][p]) for p in "KEH"]
    known = [percent(mean["normalised"]["K"]), percent(mean["identified"]), ""]
    text += row(["mean", percent(mean["expert"]), percent(mean["merged"]), *recovered, *known])
    worst, files = mean["worst"], result["files"]
    assert isinstance(files, dict)
    text += (
        f"\nWorst task under K: {percent(worst['K'])} % of its expert (merged alone: {percent(worst['merged'])} %). "
        f"All files: {sum(files.values()):,} bytes, against {sum(e['expert_bytes'] for e in tasks.values()):,} for the "
        "experts.\n\n"
    )
    return text + source(name, result) + "\n"


def _budgets(suite: str) -> str:
    name = f"budgets-{suite}"
    result = load(name)
    if result is None:
        return ""
    rows = result["rows"]
    assert isinstance(rows, list)
    text = f"**{suite}**, protocol K at several budgets (share of the experts' accuracy, percent):\n\n"
    text += row(["budget", "mean", "worst task", "agreement with the expert", "merged alone"]) + "|---" * 5 + "|\n"
    for entry in rows:
        mean = entry["mean"]
        cells = [mean["normalised"]["K"], mean["worst"]["K"], mean["agreement"]["K"], mean["normalised"]["merged"]]
        text += row([entry["budget"], *map(percent, cells)])
    return text + "\n" + source(name, result) + "\n"


def _speed() -> str:
    """Every merge method: time and anonymous memory, beside mergekit's where it has the method."""
    name = "merge_speed"
    result = load(name)
    if result is None:
        return ""
    methods, peer = result["methods"], result["mergekit"]
    assert isinstance(methods, dict)
    assert isinstance(peer, dict)
    text = (
        f"**Merging** {result['what']}: whole processes in turn on the same files, which lie in memory; retex beside "
        f"mergekit {peer['mergekit']} (a dash: it has no such method). retex remembers the SHA-256 of its inputs from "
        "the first merge on (`average`), as it does for anyone who merges the same files again. A plain copy takes "
        f"{result['copy_s']:.1f} s.\n\n"
    )
    text += row(["method", "wall s", "mergekit's", "times faster", "CPU s", "mergekit's", "anonymous MB", "mergekit's"])
    text += "|---" * 8 + "|\n"
    for method, sides in methods.items():
        ours, theirs = sides["retex"], sides.get("mergekit")
        cells = [method, f"{ours['wall_s']:.1f}"]
        cells += [f"{theirs['wall_s']:.1f}", f"{theirs['wall_s'] / ours['wall_s']:.1f}"] if theirs else ["-", "-"]
        cells += [f"{ours['cpu_s']:.1f}", f"{theirs['cpu_s']:.1f}" if theirs else "-"]
        cells += [f"{ours['anon_mb']:.0f}", f"{theirs['anon_mb']:.0f}" if theirs else "-"]
        text += row(cells)
    return text + "\n" + source(name, result) + "\n" + _flatness(result)


def _flatness(result: dict[str, object]) -> str:
    """The memory of merging by the number of layers, and by the budget that is given."""
    if "layers" not in result:
        return ""
    layers, budgets = result["layers"], result["max_memory"]
    assert isinstance(layers, dict)
    assert isinstance(budgets, dict)
    counts = list(next(iter(layers.values())))
    text = "Peak anonymous MB of the same models with more layers:\n\n"
    text += row(["method", *(f"{count} layers" for count in counts)]) + "|---" * (len(counts) + 1) + "|\n"
    for method, held in layers.items():
        text += row([method, *(f"{megabytes:.0f}" for megabytes in held.values())])
    text += "\n`--max-memory`, and what is held beyond a process that only plans the merge:\n\n"
    text += row(["method", "budget MB: held MB"]) + "|---" * 2 + "|\n"
    for method, held in budgets.items():
        text += row([method, ", ".join(f"{budget}: {megabytes:.0f}" for budget, megabytes in held.items())])
    return text + "\n"


def _architectures() -> str:
    """How many architectures came through a merge whole."""
    name = "architectures"
    result = load(name)
    if result is None:
        return ""
    totals, peer, found = result["totals"], result["mergekit"], result["architectures"]
    assert isinstance(totals, dict)
    assert isinstance(peer, dict)
    assert isinstance(found, dict)
    each = {
        side: ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items(), key=lambda pair: -pair[1]))
        for side, counts in totals.items()
    }
    text = (
        f"**Architectures**: tiny models of {len(found)}, averaged, loaded by their class and compared tensor by "
        f"tensor (lost: tensors missing or wrong). retex: {each['retex']}; mergekit {peer['mergekit']}: "
        f"{each['mergekit']}.\n\n"
    )
    return text + source(name, result) + "\n"


def _lossless() -> str:
    """Bytes of experts that come back bit for bit, beside general compressors."""
    text = ""
    for suite, entry in (load("lossless") or {}).items():
        assert isinstance(entry, dict)
        tasks = {
            task: found for task, found in entry["tasks"].items() if {"retex", "xor", "zstd", "xz"} <= found.keys()
        }
        if not tasks:
            continue
        text += (
            f"**`--lossless`**, {suite}: bytes of one expert's weights, all of them back bit for bit; XOR: the byte "
            "planes of expert XOR merged checkpoint under `zstd -19`.\n\n"
        )
        text += row(["task", "expert", "retex", "of the expert", "XOR", "`zstd -19`", "`xz -9`"]) + "|---" * 7 + "|\n"
        for task, found in tasks.items():
            assert found["retex"]["identical"]
            ours, whole = found["retex"]["bytes"], found["expert_bytes"]
            rivals = [f"{found[name]:,}" for name in ("xor", "zstd", "xz")]
            text += row([task, f"{whole:,}", f"{ours:,}", f"{percent(ours / whole)} %", *rivals])
        text += "\n" + source("lossless", entry) + "\n"
    return text


def _recovery() -> str:
    """An expert as a file: time beside a plain copy, memory by depth, the decoder."""
    name = "recovery"
    result = load(name)
    if result is None:
        return ""
    recover, start, layers, decoder = (result[key] for key in ("recover", "start", "layers", "decoder"))
    assert isinstance(recover, dict)
    assert isinstance(start, dict)
    assert isinstance(layers, dict)
    assert isinstance(decoder, list)
    held = ", ".join(f"{megabytes:.0f} MB with {count} layers" for count, megabytes in layers.items())
    rates = ", ".join(f"{row['symbols_m_per_s']:.0f} (at {row['bits']:.1f} bits)" for row in decoder)
    factors = ", ".join(f"{row['factors_m_per_s']:.0f}" for row in decoder)
    text = (
        f"**Recovering** a MiniLM expert of {result['merged_mb']:.0f} MB: {recover['wall_s']:.2f} s "
        f"({recover['cpu_s']:.2f} s of CPU), where a process that only starts and plans takes {start['wall_s']:.2f} s "
        f"({start['cpu_s']:.2f} s; what recovery takes beyond it {recover['beyond_start_s']:.3f} s) and a plain copy "
        f"that is on the disk {result['copy_s']:.3f} s, medians of processes in turn. Peak anonymous memory: {held}. "
        f"The decoder reads {rates} million symbols a second on one core ({factors} up to the factors).\n\n"
    )
    return text + source(name, result) + "\n"


def _offsets_speed() -> str:
    """Large models: merge, fit and recover as whole processes."""
    name = "offsets_speed"
    result = load(name)
    if result is None:
        return ""
    models = result["models"]
    assert isinstance(models, dict)
    text = (
        "**Large models**, random weights and white-noise task vectors: whole processes, seconds and anonymous MB. "
        "Recovery into a folder that is on the disk, beside a process that only plans it and a plain copy, in turns, "
        "medians.\n\n"
    )
    heads = ["models", "merge s", "MB", "budget", "fit s", "MB", "recover s", "MB", "plan s", "copy s", "times a copy"]
    text += row(heads) + "|---" * len(heads) + "|\n"
    for entry in models.values():
        merge, recover, start, copy = (entry[key] for key in ("merge", "recover", "start", "copy_s"))
        for budget, fit in entry["fit"].items():
            back = recover[budget]
            times = back["beyond_start_s"] / copy
            after = [f"{back['wall_s']:.1f}", f"{back['anon_mb']:.0f}", f"{start['wall_s']:.1f}", f"{copy:.1f}"]
            cells = [entry["what"], f"{merge['wall_s']:.0f}", f"{merge['anon_mb']:.0f}"]
            cells += [budget.replace("%", " %"), f"{fit['wall_s']:.0f}", f"{fit['anon_mb']:.0f}"]
            text += row([*cells, *after, f"{times:.2f}"])
    places = {
        f"`{str(entry[key])[:10]}` ({entry['processor']})"
        for entry in models.values()
        for key in ("fit_commit", "commit")
    }
    note = "" if len(places) == 1 else f"Measured at {' and '.join(sorted(places))}.\n\n"
    return text + "\n" + note + source(name, result) + "\n"


def _switching() -> str:
    """An expert inside a loaded model, beside copying weights into it."""
    name = "switching"
    result = load(name)
    if result is None:
        return ""
    heads = {
        "copy_ms": "plain copy of all weights",
        "merged_ms": "merged weights",
        "expert_ms": "another expert",
        "mix_ms": "a mix of two",
        "first_ms": "an expert for the first time (decoding)",
    }
    text = (
        f"**Switching** a loaded MiniLM of {result['weights_mb']:.0f} MB, in milliseconds of one core; another expert "
        f"takes {result['times_copy']:.1f} times a plain copy. Held for it beside the model: "
        f"{result['held_mb']:.0f} MB.\n\n"
    )
    text += row(list(heads.values())) + "|---" * len(heads) + "|\n"
    text += row([f"{result[key]:.0f}" for key in heads])
    return text + "\n" + source(name, result) + "\n"


def serving_tables() -> str:
    """An ``Experts`` call beside one forward pass of the merged model, by the size of the group."""
    result = load("serving")
    if result is None:
        return "\nNothing measured yet: run `benchmarks/serving.py`.\n"
    devices = result["devices"]
    assert isinstance(devices, dict)
    text = ""
    for device, found in devices.items():
        text += (
            f"\nOn {'the CPU' if device == 'cpu' else 'CUDA'}, {found['threads']} threads, MiniLM and short texts of "
            f"one task of text4; {found['held_mb']:.0f} MB held. Milliseconds of a call, and in brackets how many "
            "forward passes of the merged model on the same texts that is:\n\n"
        )
        heads = ["inputs", "one forward pass", "identification", "answers, expert at hand", "answers, expert switched"]
        text += row(heads) + "|---" * len(heads) + "|\n"
        for entry in found["rows"]:
            pass_ms = entry["forward_ms"]
            cells = [f"{entry[k]:.1f} ({entry[k] / pass_ms:.2f})" for k in ("identify_ms", "same_ms", "switched_ms")]
            text += row([str(entry["group"]), f"{pass_ms:.1f}", *cells])
    return text + "\n" + source("serving", result)


def readme_tables() -> str:
    """Everything between the README's ``measured`` marks."""
    from pareto_tables import ours_table

    accuracy = [_demo("text4"), _demo("text8"), _budgets("text4"), ours_table()]
    parts = [*accuracy, _lossless(), _speed(), _offsets_speed(), _recovery(), _switching(), _architectures()]
    return "\n" + "".join(parts) if any(parts) else "\nNothing measured yet: run the scripts in `benchmarks/`.\n"
