"""Who finds the task of an input: retex's signatures beside the published identifiers, in one harness.

    python benchmarks/identify.py text8|vision6 [--fresh]

Full test sets, one input at a time; means over three draws of the reference inputs, all from the training split. What
an identification is worth is looked up: every recovered expert answers test inputs of every task once (``suite_runs``).
E takes the identified encoder and the true head, H both as identified, both as a share of K (task known). ESM++, which
decides at every layer, runs its own forward pass on a sample of test rows (``layerwise``). Rows are kept in the cache,
with the commit they were measured at; results go to ``results/identify-SUITE.json``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import layerwise
import numpy as np
import torch
from identifiers.form import Fitted, Identifier
from identifiers.table import identifiers
from record import ROOT, provenance, write
from suite_runs import DRAWS, LARGEST, Names, Suite, draw, milliseconds
from torch import Tensor

from retex_cli.progress import Silent
from retex_cli.signatures import Signatures, fit
from retex_cli.signatures.calibrate import wilson

COUNTS = (32, LARGEST)
OURS = "retex"
BATCH, BATCHES = 16, 1000
"""Inputs that share a task, and how many random batches of them are tried per task."""

Features = Mapping[str, Mapping[str, Tensor]]
Entry = dict[str, object]


def matrices(suite: Suite) -> dict[str, dict[int, list[Tensor]]]:
    """Task vectors of the matrices that read a layer's output as it is: queries, keys and values, or expansions."""
    found: dict[str, dict[int, list[Tensor]]] = {}
    for task in suite.tasks:
        expert = suite.expert(task)
        names = {name.removeprefix(layerwise.prefix(expert.tensors)): name for name in expert.tensors}
        of: dict[int, list[Tensor]] = {}
        for name in suite.base.tensors:
            layer = layerwise.reads(name)
            if layer is not None:
                difference = expert.read(names[name]).float() - suite.base.read(name).float()
                of.setdefault(layer, []).append(difference.flatten(1))
        found[task] = of
    return found


def judged(suite: Suite, answers: Mapping[str, Mapping[str, Names]], scores: Mapping[str, Tensor]) -> Entry:
    """Task accuracy, E and H as shares of K, and wrong batches, from every task's scores [m, T]."""
    entry: dict[str, dict[str, float]] = {key: {} for key in ("accuracy", "E", "H", "E_expert", "H_expert", "batches")}
    for t, task in enumerate(suite.tasks):
        every = scores[task].argmin(1).numpy()
        found, truth, given = every[suite.answered(task)], answers[task]["truth"], answers[task]
        known = float((given[f"E:{task}"] == truth).mean())
        expert = float((given["expert"] == truth).mean())
        entry["accuracy"][task] = float((every == t).mean())
        for protocol in ("E", "H"):
            said = np.stack([given[f"{protocol}:{other}"] for other in suite.tasks])
            right = float((said[found, np.arange(len(truth))] == truth).mean())
            entry[protocol][task] = right / known
            entry[f"{protocol}_expert"][task] = right / expert
        entry["batches"][task] = float(wrong_batches(scores[task], t))
    return dict(entry)


def wrong_batches(scores: Tensor, task: int) -> int:
    """Of ``BATCHES`` random batches of inputs, how many the summed scores give to another task."""
    drawn = torch.randint(len(scores), (BATCHES, BATCH), generator=torch.Generator().manual_seed(0))
    return int((scores[drawn].sum(1).argmin(1) != task).sum())


def calibration(signatures: Signatures, features: Features) -> Entry:
    """What retex alone says: how sure it is beside how often it is right, and its false alarms on the test inputs."""
    sure, right, alarms = [], [], []
    for t, task in enumerate(signatures.tasks):
        decisions = signatures.identify(features[task]["test"])
        sure.append(decisions.probability)
        right.append((decisions.task == t).double())
        alarms.append(decisions.unknown.double())
    every = torch.cat(alarms)
    order = torch.cat(sure).argsort().chunk(15)
    gaps = [abs(float((torch.cat(sure)[part] - torch.cat(right)[part]).mean())) * len(part) for part in order]
    return {
        "choice": signatures.describe(),
        "wanted_alarms": signatures.recipe.false_alarms,
        "alarms": float(np.mean([float(part.mean()) for part in alarms])),
        "alarms_worst": max(float(part.mean()) for part in alarms),
        "alarms_interval": wilson(int(every.sum()), len(every)),
        "promised_interval": signatures.alarm.interval,
        "calibration_error": sum(gaps) / len(every),
        "confidence": float(torch.cat(sure).mean()),
    }


def ours(references: Mapping[str, Tensor]) -> tuple[Fitted, Signatures]:
    """retex's default, as its file keeps it."""
    signatures = fit(references)
    return Fitted(signatures.score, sum(part.nbytes for part in signatures.stored.values())), signatures


def measured(
    suite: Suite,
    answers: Mapping[str, Mapping[str, Names]],
    features: Features,
    how: Identifier,
    count: int,
    number: int,
) -> Entry:
    """One identifier at one draw."""
    references = {task: draw(features[task]["train"], count, number) for task in suite.tasks}
    more: Entry = {}
    if how.name == OURS:
        fitted, signatures = ours(references)
        more = calibration(signatures, features)
    else:
        fitted = how.fit(references)
    entry = judged(suite, answers, {task: fitted.scores(features[task]["test"]) for task in suite.tasks})
    some = torch.cat([part["test"][:64] for part in features.values()])
    return {
        **entry,
        **more,
        "bytes": fitted.bytes / len(suite.tasks),
        "ms": milliseconds(lambda: fitted.scores(some), len(some)),
        "commit": provenance()["commit"],
    }


def pass_ms(suite: Suite) -> float:
    """Milliseconds of one core for the forward pass of one input, in batches."""
    rows = suite.test(suite.tasks[0])[:64]
    encoder = suite.encoder(suite.merged)
    return milliseconds(lambda: encoder.features(rows, 64, Silent()), len(rows), repeats=3)


def mean(entries: list[Entry]) -> Entry:
    """Means over draws: per task and over tasks, and of single numbers; the batches are summed."""
    found: Entry = {key: value for key, value in entries[0].items() if isinstance(value, (str, dict, list, tuple))}
    for key, value in entries[0].items():
        if isinstance(value, float):
            found[key] = float(np.mean([entry[key] for entry in entries]))  # type: ignore[arg-type]
        elif isinstance(value, dict) and key != "choice":
            tasks = {task: [float(entry[key][task]) for entry in entries] for task in value}  # type: ignore[index]
            found[key] = {task: float(np.mean(values)) for task, values in tasks.items()}
            if key == "batches":
                found["wrong_batches"] = sum(sum(values) for values in tasks.values())
                found["tried_batches"] = BATCHES * len(entries) * len(tasks)
            else:
                found[f"{key}_mean"] = float(np.mean([np.mean(values) for values in tasks.values()]))
                found[f"{key}_worst"] = min(float(np.mean(values)) for values in tasks.values())
    found["draws"] = len(entries)
    return found


class Rows:
    """Measured rows in the suite's cache: identifier -> count -> draw."""

    def __init__(self, place: Path, *, fresh: bool) -> None:
        self._place = place
        self.known: dict[str, dict[str, dict[str, Entry]]] = {}
        if place.is_file() and not fresh:
            self.known = json.loads(place.read_text())

    def get(self, name: str, count: int, number: int, make: Callable[[], Entry]) -> Entry:
        """The row, measured now if it is not there."""
        here = self.known.setdefault(name, {}).setdefault(str(count), {})
        if str(number) not in here:
            here[str(number)] = make()
            self._place.write_text(json.dumps(self.known, indent=1))
            accuracy = here[str(number)]["accuracy"]
            assert isinstance(accuracy, dict)
            print(f"{name}, {count} inputs, draw {number}: {100 * np.mean(list(accuracy.values())):.2f} %", flush=True)
        return json.loads(json.dumps(here[str(number)]))  # type: ignore[no-any-return]


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=("text8", "vision6"))
    parser.add_argument("--fresh", action="store_true", help="measure again what the cache has")
    arguments = parser.parse_args()
    suite = Suite(arguments.suite, ROOT / ".demo" / arguments.suite)
    features = {which: suite.features(which) for which in ("merged", "base")}
    answers = suite.answers()
    rows = Rows(suite.cache / "rows.json", fresh=arguments.fresh)
    layers = fit({task: draw(part["train"], 32, 0) for task, part in features["merged"].items()}).layout.layers
    table = [Identifier(OURS, "merged", lambda r: ours(r)[0]), *identifiers(layers, matrices(suite))]
    result: dict[str, object] = {}
    for how in table:
        for count in (0,) if how.data_free else COUNTS:
            numbers = range(1 if how.data_free else DRAWS)

            def one(number: int, how: Identifier = how, count: int = count) -> Entry:
                return measured(suite, answers, features[how.encoder], how, count or 32, number)

            entries = [rows.get(how.name, count, number, lambda n=number, f=one: f(n)) for number in numbers]  # type: ignore[misc]
            result.setdefault(how.name, {"note": how.note})[str(count)] = mean(entries)  # type: ignore[index]
    for rank in layerwise.RANKS:
        name = f"ESM++, r = {rank}"
        for count in COUNTS:
            entries = [
                rows.get(name, count, number, lambda c=count, n=number, r=rank: layerwise.measured(suite, c, n, r))  # type: ignore[misc]
                for number in range(DRAWS)
            ]
            result.setdefault(name, {"note": layerwise.NOTE})[str(count)] = mean(entries)  # type: ignore[index]
    tests = {task: len(part["test"]) for task, part in features["merged"].items()}
    expert_bytes = np.mean([sum(file.stat().st_size for file in suite.expert(task).files) for task in suite.tasks])
    done: dict[str, object] = {
        "test_rows": tests,
        "answered_rows": {task: len(found["truth"]) for task, found in answers.items()},
        "expert_bytes": float(expert_bytes),
        "pass_ms": pass_ms(suite),
        "identifiers": result,
    }
    print(f"wrote {write(f'identify-{arguments.suite}', done)}")


if __name__ == "__main__":
    main()
