"""A task that nobody merged: is it noticed, and does a mix of the experts read it better than any of them?

    python benchmarks/unseen.py text8|vision6 [--kept] [--fresh]

Leave one task out: the others are merged, their signatures built. Noticed: area under the curve of the surprise of the
left-out task's test inputs against the others', by themselves and in batches of 16, and how many are called unknown at
the stated rate. Read: a linear probe, trained on labelled training rows of the left-out task, on the frozen final
embedding of the merged model, of the base, of every expert, and of soft experts ``merged + sum e_t offset_t`` with
``e = softmax(-score / tau)`` averaged over the unlabelled references (arXiv 2606.26902); exact offsets.
Features and probes are kept in the cache; results go to ``results/unseen-SUITE.json``.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from identifiers.form import unit
from record import provenance, write
from suite_runs import DRAWS, LARGEST, Suite, command_line
from torch import Tensor

import retex_cli
from retex_cli.io.align import align
from retex_cli.io.checkpoint import open_checkpoint
from retex_cli.io.inputs import Example
from retex_cli.models.encoder import Encoder
from retex_cli.models.network import Network
from retex_cli.parallel import thread_count
from retex_cli.progress import Silent
from retex_cli.signatures import Signatures, fit
from retex_cli.signatures.calibrate import wilson

COUNTS = (32, LARGEST)
TESTS = 200
"""Test rows of a task."""

BATCH, BATCHES = 16, 200
SOFTER = (1.0, 4.0, 16.0)
"""tau of the soft expert, in units of the calibrated temperature."""

PENALTIES = (0.1, 1.0, 10.0, 100.0)
"""C of the probe, by a three-fold cross-validation."""

Entry = dict[str, object]
Weights = Mapping[str, Tensor]


def auroc(known: Tensor, unknown: Tensor) -> float:
    """How often an unknown input is more surprising than a known one; ties count half."""
    ordered = known.double().sort().values
    below = torch.searchsorted(ordered, unknown.double())
    up_to = torch.searchsorted(ordered, unknown.double(), right=True)
    return float((below + up_to).double().mean() / 2 / len(ordered))


def noticed(signatures: Signatures, tests: Mapping[str, Tensor], left_out: str) -> dict[str, float]:
    """The others' test features [m, L, D] against the left-out task's."""
    surprise = {task: signatures.identify(part).surprise for task, part in tests.items()}
    known = torch.cat([part for task, part in surprise.items() if task != left_out])
    batches = {task: _batches(signatures, part) for task, part in tests.items()}
    known_batches = torch.cat([part for task, part in batches.items() if task != left_out])
    threshold = signatures.alarm.threshold
    return {
        "auroc": auroc(known, surprise[left_out]),
        "auroc_batches": auroc(known_batches, batches[left_out]),
        "unknown": float((surprise[left_out] > threshold).double().mean()),
        "unknown_batches": float((batches[left_out] > signatures.alarm.threshold_of_mean(BATCH)).double().mean()),
        "alarms": float((known > threshold).double().mean()),
        "alarms_batches": float((known_batches > signatures.alarm.threshold_of_mean(BATCH)).double().mean()),
    }


def _batches(signatures: Signatures, part: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(len(part), (BATCH,), generator=generator) for _ in range(BATCHES)]
    return torch.cat([signatures.identify_batch(part[rows]).surprise for rows in drawn])


def probe(train: Tensor, labels: list[str], test: Tensor, truth: list[str]) -> float:
    """Accuracy of a logistic regression on unit-length embeddings [n, width]."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import KFold, cross_val_score

    rows, held = unit(train).numpy(), unit(test).numpy()
    middle, scale = rows.mean(0), rows.std()
    rows, held = (rows - middle) / scale, (held - middle) / scale
    folds = KFold(3, shuffle=True, random_state=0)

    def score(penalty: float) -> float:
        model = LogisticRegression(C=penalty, max_iter=500, tol=1e-3)
        return float(cross_val_score(model, rows, labels, cv=folds).mean())

    best = max(PENALTIES, key=score)
    model = LogisticRegression(C=best, max_iter=500, tol=1e-3).fit(rows, labels)
    return float((model.predict(held) == np.array(truth)).mean())


class LeftOut:
    """One task left out: the others merged, their features, and encoders to probe."""

    def __init__(self, suite: Suite, task: str, folder: Path) -> None:
        self.suite, self.task = suite, task
        self.others = [other for other in suite.tasks if other != task]
        experts = suite.space.with_experts({})
        retex_cli.merge(
            suite.space.need_base(None), {other: experts[other] for other in self.others}, str(folder / "merged")
        )
        self.checkpoint = open_checkpoint(str(folder / "merged"))
        self.merged = {name: self.checkpoint.read(name) for name in self.checkpoint.tensors}

    def tests(self) -> dict[str, list[Example]]:
        """At most ``TESTS`` labelled rows of every task."""
        rows = {task: self.suite.test(task) for task in self.suite.tasks}
        return {
            task: part if len(part) <= TESTS else random.Random(0).sample(part, TESTS) for task, part in rows.items()
        }

    def shared(self, other: str) -> dict[str, Tensor]:
        """An expert's shared tensors by the base's names."""
        expert = self.suite.expert(other)
        names = align(self.suite.base, expert).shared
        return {name: expert.read(theirs) for name, theirs in names.items() if name in self.merged}

    def soft(self, shares: Mapping[str, float]) -> Weights:
        """``merged + sum e_t (expert_t - merged)`` for shares that sum to one: the experts' weighted mean."""
        mixed = {name: torch.zeros_like(t, dtype=torch.float32) for name, t in self.merged.items()}
        for other, share in shares.items():
            expert = self.shared(other)
            for name, total in mixed.items():
                total += share * expert.get(name, self.merged[name]).float()
        return {name: total.to(self.merged[name].dtype) for name, total in mixed.items()}

    def embeddings(self, weights: Weights, rows: list[Example]) -> Tensor:
        """Final layer, pooled: [n, width]."""
        limit = self.suite.space.signatures.max_length
        assert self.checkpoint.folder is not None
        network = Network(self.checkpoint.folder, self.suite.device, model=self.suite.space.model, max_length=limit)
        network.load(weights.items(), "probed")
        return Encoder(network, thread_count(None)).features(rows, 64, Silent())[:, -1]


def measured(suite: Suite, task: str, kept: dict[str, Entry]) -> None:
    """What takes long for one left-out task, into ``kept``: the features that signatures read, and the probes."""
    with tempfile.TemporaryDirectory(dir=suite.folder) as name:
        left = LeftOut(suite, task, Path(name))
        encoder = suite.encoder(left.checkpoint)
        tests = left.tests()
        train = {t: [example for example, _ in suite.train(t)[:LARGEST]] for t in suite.tasks}
        arrays = {f"test/{t}": encoder.features(rows, 64, Silent()).numpy() for t, rows in tests.items()}
        arrays |= {f"train/{t}": encoder.features(rows, 64, Silent()).numpy() for t, rows in train.items()}
        np.savez(place_of(suite, task), **arrays)
        references = {other: torch.from_numpy(arrays[f"train/{other}"]) for other in left.others}
        entry: Entry = {}
        entry["probes"], entry["shares"] = _probes(
            left, fit(references), torch.from_numpy(arrays[f"train/{task}"]), train[task], tests[task]
        )
        kept[task] = {**entry, "commit": provenance()["commit"]}


def place_of(suite: Suite, task: str) -> Path:
    """Features of the merge without this task."""
    return suite.cache / f"unseen-{task}.npz"


def judged(suite: Suite, task: str) -> Entry:
    """How well the left-out task is noticed, from its kept features; means over draws of fewer references."""
    with np.load(place_of(suite, task)) as file:
        found = {name: torch.from_numpy(file[name]) for name in file.files}
    tests = {other: found[f"test/{other}"] for other in suite.tasks}
    entry: Entry = {}
    for count in COUNTS:
        draws = []
        for start in range(0, DRAWS * count, count) if count < LARGEST else (0,):
            references = {t: found[f"train/{t}"][start : start + count] for t in suite.tasks if t != task}
            draws.append(noticed(fit(references), tests, task))
        mean = {key: float(np.mean([draw[key] for draw in draws])) for key in draws[0]}
        known = sum(len(part) for other, part in tests.items() if other != task)
        entry[str(count)] = {**mean, "alarms_interval": wilson(round(mean["alarms"] * known), known)}
    return entry


def _probes(
    left: LeftOut, signatures: Signatures, features: Tensor, rows: list[Example], tests: list[Example]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    labels = [label for _, label in left.suite.train(left.task)[: len(rows)]]
    truth = [str(row.label) for row in tests]
    candidates: dict[str, Weights] = {
        "merged": left.merged,
        "base": {name: left.suite.base.read(name) for name in left.merged},
    }
    shares = {}
    for softer in SOFTER:
        e = signatures.soft(features, softer * signatures.recipe.temperature).mean(0)
        shares[f"soft, {softer:g} tau"] = dict(zip(left.others, e.tolist(), strict=True))
        candidates[f"soft, {softer:g} tau"] = left.soft(shares[f"soft, {softer:g} tau"])
    found = {name: left.embeddings(weights, [*rows, *tests]) for name, weights in candidates.items()}
    for other in left.others:
        found[f"expert {other}"] = left.embeddings({**left.merged, **left.shared(other)}, [*rows, *tests])
    count = len(rows)
    return {name: probe(part[:count], labels, part[count:], truth) for name, part in found.items()}, shares


def main() -> None:
    """Read the command line and measure."""
    parser = command_line(__doc__)
    parser.add_argument(
        "--kept", action="store_true", help="measure no further task, write the result of those there are"
    )
    arguments = parser.parse_args()
    suite = Suite.named(arguments.suite)
    place = suite.cache / "unseen.json"
    kept: dict[str, Entry] = json.loads(place.read_text()) if place.is_file() and not arguments.fresh else {}
    for task in suite.tasks:
        if not arguments.kept and (task not in kept or not place_of(suite, task).is_file()):
            measured(suite, task, kept)
            place.write_text(json.dumps(kept, indent=1))
            print(task, json.dumps(kept[task]["probes"]), flush=True)
    tasks = {task: {**judged(suite, task), **kept[task]} for task in suite.tasks if task in kept}
    print(f"wrote {write(f'unseen-{suite.name}', {'test_rows': TESTS, 'tasks': tasks})}")


if __name__ == "__main__":
    main()
