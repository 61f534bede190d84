"""What several recovered experts answer together to the test inputs whose task is unsure, as serving and eval do it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from suite_runs import Suite, save
from torch import Tensor

from retex_cli.models.classifier import Heard, likeliest
from retex_cli.signatures import Signatures

Mixed = Mapping[str, Mapping[str, Mapping[int, str]]]
"""Protocol E or H -> task -> labels by place among the suite's ``answered`` rows."""


def mixed_answers(
    suite: Suite, signatures: Signatures, features: Mapping[str, Mapping[str, Tensor]]
) -> tuple[Mixed, dict[str, float]]:
    """The answers where more than one expert is asked; and per task how many are asked of an input, on average."""
    shares = {task: signatures.identify(features[task]["test"][suite.answered(task)]).shares for task in suite.tasks}
    unsure = {task: (of > 0).sum(1) > 1 for task, of in shares.items()}
    heads, read = suite.heads(), {}
    for e, expert in enumerate(suite.tasks):
        wanted = {t: ((of[:, e] > 0) & unsure[t]).nonzero()[:, 0].tolist() for t, of in shares.items()}
        read[expert] = states(suite, expert, wanted)
    mixed: dict[str, dict[str, dict[int, str]]] = {name: {task: {} for task in suite.tasks} for name in ("E", "H")}
    for task, of in shares.items():
        for i in unsure[task].nonzero()[:, 0].tolist():
            asked = {expert: float(of[i, e]) for e, expert in enumerate(suite.tasks) if of[i, e] > 0}
            for name, given in mixed.items():
                heard = {}
                for expert, share in asked.items():
                    head = heads[task if name == "E" else expert]
                    heard[expert] = Heard(head.labels.tolist(), head.logits(read[expert][task][i]), share)
                given[task][i] = likeliest(heard)[0]
    return mixed, {task: float((of > 0).sum(1).double().mean()) for task, of in shares.items()}


def states(suite: Suite, expert: str, wanted: Mapping[str, Sequence[int]]) -> dict[str, dict[int, Tensor]]:
    """Task -> what the last layer of a recovered expert reads, float32 [width], by place among the ``answered`` rows:
    of those ``wanted`` and of all that were wanted before, which are kept."""
    place = suite.cache / f"states-{expert}.npz"
    known: dict[str, dict[int, Tensor]] = {task: {} for task in suite.tasks}
    if place.is_file():
        with np.load(place) as file:
            for task in {name.partition("/")[0] for name in file.files}:
                rows = torch.from_numpy(file[f"{task}/states"])
                known[task] = dict(zip(file[f"{task}/places"].tolist(), rows, strict=True))
    missing = {task: sorted(set(places) - set(known[task])) for task, places in wanted.items()}
    if any(missing.values()):
        network = suite.recovered(expert)
        for task, places in missing.items():
            if places:
                answered, tests = suite.answered(task), suite.test(task)
                found = suite.before_head(network, [tests[answered[i]] for i in places])
                known[task] |= dict(zip(places, found, strict=True))
        arrays = {f"{task}/places": np.array(list(rows)) for task, rows in known.items() if rows}
        arrays |= {f"{task}/states": torch.stack(list(rows.values())).numpy() for task, rows in known.items() if rows}
        save(place, arrays)
    return known
