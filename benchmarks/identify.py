"""Who finds the task of an input: retex's signatures beside the published identifiers, in one harness.

    python benchmarks/identify.py text8|vision6 [--only NAME] [--kept] [--fresh]
    python benchmarks/identify.py text8|vision6 --time

Full test sets, one input at a time; means over three draws of the reference inputs, all from the training split. What
an identification is worth is looked up: every recovered expert answers test inputs of every task once (``suite_runs``).
E takes the identified encoder and the true head, H both as identified, both as a share of K (task known); "blended" is
retex where several experts answer inputs whose task is unsure (``blends``), as they do by default. ESM++, which decides
at every layer, runs its own forward pass on a sample of test rows (``layerwise``). Rows are kept in the cache, with the
commit they were measured at, and so are times, which ``--time`` measures on a machine that does nothing else; results
go to ``results/identify.json``.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path

import layerwise
import numpy as np
import torch
from blends import Mixed, mixed_answers
from identifiers import router
from identifiers.form import Fitted, Identifier
from identifiers.table import identifiers
from identify_tables import BLENDED, OURS
from record import provenance, write_part
from suite_runs import ANSWERED, DRAWS, LARGEST, Names, Suite, command_line, draw, milliseconds
from torch import Tensor

from retex_cli.signatures import Signatures, fit
from retex_cli.signatures.calibrate import wilson
from retex_cli.signatures.signatures import ASKED, UNSURE

COUNTS = (32, LARGEST)
BATCH, BATCHES = 16, 1000
"""Inputs that share a task, and how many random batches of them are tried per task."""

TOGETHER = (1, 32)
"""Inputs that are identified at once, where time is measured."""

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


def judged(
    suite: Suite, answers: Mapping[str, Mapping[str, Names]], scores: Mapping[str, Tensor], mixed: Mixed | None = None
) -> Entry:
    """Task accuracy, E and H as shares of K, and wrong batches, from every task's scores [m, T].

    The nearest task's expert answers, but for inputs that several have answered, which are ``mixed``.
    """
    entry: dict[str, dict[str, float]] = {key: {} for key in ("accuracy", "E", "H", "E_expert", "H_expert", "batches")}
    for t, task in enumerate(suite.tasks):
        every = scores[task].argmin(1).numpy()
        found, truth, given = every[suite.answered(task)], answers[task]["truth"], answers[task]
        known = float((given[f"E:{task}"] == truth).mean())
        expert = float((given["expert"] == truth).mean())
        entry["accuracy"][task] = float((every == t).mean())
        for protocol in ("E", "H"):
            said = np.stack([given[f"{protocol}:{other}"] for other in suite.tasks])
            hits = said[found, np.arange(len(truth))] == truth
            for place, label in (mixed[protocol][task] if mixed else {}).items():
                hits[place] = label == truth[place]
            right = float(hits.mean())
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
    mixed: Mixed | None = None
    if how.name in (OURS, BLENDED):
        fitted, signatures = ours(references)
        if how.name == OURS:
            more = calibration(signatures, features)
        else:
            mixed, more["asked"] = mixed_answers(suite, signatures, features)
    else:
        fitted = how.fit(references)
    entry = judged(suite, answers, {task: fitted.scores(features[task]["test"]) for task in suite.tasks}, mixed)
    return {**entry, **more, "bytes": fitted.bytes / len(suite.tasks), **fitted.chosen, **commit()}


def commit() -> Entry:
    """Which sources measured a row."""
    return {"commit": provenance()["commit"]}


def costs(suite: Suite, features: Mapping[str, Features], table: list[Identifier]) -> dict[str, object]:
    """Milliseconds of one core an input, for one input at a time and for batches: of the merged model's forward pass,
    and of every identifier from features to scores; of retex to the whole decision, too."""
    fitted: dict[str, tuple[str, Callable[[Tensor], object]]] = {}
    for how in (row for row in table if row.name != BLENDED):
        for size in (0,) if how.data_free else COUNTS:
            references = {t: draw(features[how.encoder][t]["train"], size or 32, 0) for t in suite.tasks}
            if how.name == OURS:
                signatures = fit(references)
                fitted[f"{OURS}/{size}"] = how.encoder, signatures.score
                fitted[f"{OURS} decides/{size}"] = how.encoder, signatures.identify
            else:
                fitted[f"{how.name}/{size}"] = how.encoder, how.fit(references).scores
    encoder, run = suite.encoder(suite.merged), layerwise.Run(suite, 0, suite.merged.reference)
    made: dict[str, object] = {}
    for count in TOGETHER:
        places = random.Random(0).sample([(t, i) for t in suite.tasks for i in range(count)], count)
        tests = {t: suite.test(t)[:count] for t in suite.tasks}
        inputs = encoder.network.inputs([tests[t][i] for t, i in places])
        with encoder.network.inference():
            found = {"pass": milliseconds(partial(encoder.network.module, **inputs), count, seconds=2.0)}
        for name, (which, work) in fitted.items():
            some = torch.stack([features[which][t]["test"][i] for t, i in places])
            found[name] = milliseconds(partial(work, some), count)
        for rank in layerwise.RANKS:
            run.made_up(rank)
            extra = run.extra_ms(count)
            found |= {f"ESM++, r = {rank}/{size}": extra for size in COUNTS}
        made[str(count)] = found
    return {**made, **commit()}


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

    def __init__(self, place: Path, *, fresh: bool, kept: bool) -> None:
        self._place, self._kept = place, kept
        self.known: dict[str, dict[str, dict[str, Entry]]] = {}
        if place.is_file() and not fresh:
            self.known = json.loads(place.read_text())

    def get(self, name: str, count: int, number: int, make: Callable[[], Entry]) -> Entry | None:
        """The row, measured now if it is not there; None where rows are only looked up."""
        here = self.known.setdefault(name, {}).setdefault(str(count), {})
        if str(number) not in here and self._kept:
            return None
        if str(number) not in here:
            here[str(number)] = make()
            self._place.write_text(json.dumps(self.known, indent=1))
            accuracy = here[str(number)]["accuracy"]
            assert isinstance(accuracy, dict)
            print(f"{name}, {count} inputs, draw {number}: {100 * np.mean(list(accuracy.values())):.2f} %", flush=True)
        return json.loads(json.dumps(here[str(number)]))  # type: ignore[no-any-return]


def main() -> None:
    """Read the command line and measure."""
    parser = command_line(__doc__)
    parser.add_argument("--only", help="measure the identifiers whose names begin so, and write no result")
    parser.add_argument("--kept", action="store_true", help="measure nothing, write the result of the rows there are")
    parser.add_argument("--time", action="store_true", help="measure milliseconds instead of shares")
    arguments = parser.parse_args()
    suite = Suite.named(arguments.suite)
    features = {which: suite.features(which) for which in ("merged", "base")}
    times = suite.cache / "times.json"
    if arguments.time:
        times.write_text(json.dumps(costs(suite, features, table(suite, features, quick=True)), indent=1))
        return
    rows = Rows(suite.cache / "rows.json", fresh=arguments.fresh, kept=arguments.kept)
    result = shares(suite, features, rows, arguments.only or "")
    if arguments.only is not None:
        return
    tests = {task: len(part["test"]) for task, part in features["merged"].items()}
    expert_bytes = np.mean([sum(file.stat().st_size for file in suite.expert(task).files) for task in suite.tasks])
    done: dict[str, object] = {
        "test_rows": tests,
        "answered_rows": {task: min(count, ANSWERED) for task, count in tests.items()},
        "sampled_rows": layerwise.TESTS,
        "expert_bytes": float(expert_bytes),
        "milliseconds": json.loads(times.read_text()) if times.is_file() else {},
        "identifiers": result,
    }
    print(f"wrote {write_part('identify', suite.name, done)}")


def table(suite: Suite, features: Mapping[str, Features], *, quick: bool = False) -> list[Identifier]:
    """retex first, then the published ones; ``quick``: with one penalty for the routers."""

    @cache
    def layers() -> tuple[int, ...]:
        references = {task: draw(part["train"], 32, 0) for task, part in features["merged"].items()}
        return fit(references).layout.layers

    penalties = (1e-3,) if quick else router.PENALTIES
    published = identifiers(layers, lambda: matrices(suite), penalties)
    blend = f"inputs under {100 * UNSURE:g} % sure are answered by the {ASKED} likeliest experts together"
    mine = [
        Identifier(name, "merged", lambda references: ours(references)[0], note=note)
        for name, note in ((OURS, ""), (BLENDED, blend))
    ]
    return [*mine, *published]


def shares(suite: Suite, features: Mapping[str, Features], rows: Rows, only: str) -> dict[str, dict[str, object]]:
    """Every identifier whose name begins with ``only``: its note, and by the number of inputs the mean of its draws."""
    answers = suite.answers()
    plan: list[tuple[str, str, int, range, Callable[[int], Entry]]] = []
    for how in table(suite, features):

        def one(number: int, how: Identifier = how, count: int = 0) -> Entry:
            return measured(suite, answers, features[how.encoder], how, count or 32, number)

        for count in (0,) if how.data_free else COUNTS:
            numbers = range(1 if how.data_free else DRAWS)
            plan.append((how.name, how.note, count, numbers, partial(one, count=count)))
    run = cache(partial(layerwise.Run, suite))

    def layered(number: int, rank: int, count: int) -> Entry:
        return layerwise.measured(run(number), count, rank)

    for rank, draws in layerwise.RANKS.items():
        for count in COUNTS:
            found = partial(layered, rank=rank, count=count)
            plan.append((f"ESM++, r = {rank}", layerwise.NOTE, count, range(draws), found))
    result: dict[str, dict[str, object]] = {}
    for name, note, count, numbers, make in plan:
        if name.startswith(only):
            entries = [rows.get(name, count, number, partial(make, number)) for number in numbers]
            if known := [entry for entry in entries if entry is not None]:
                result.setdefault(name, {"note": note})[str(count)] = mean(known)
    return result


if __name__ == "__main__":
    main()
