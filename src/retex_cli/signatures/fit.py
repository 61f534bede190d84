"""Fitting signatures to a few unlabelled inputs of every task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from retex_cli.errors import UsageError
from retex_cli.signatures import residual
from retex_cli.signatures.calibrate import entropy, owners
from retex_cli.signatures.features import Layout, check_tasks, concatenate, layer_widths, unit_layers
from retex_cli.signatures.join import scatter_of, store
from retex_cli.signatures.recipe import Recipe
from retex_cli.signatures.select import Choice, choice, select
from retex_cli.signatures.signatures import Signatures
from retex_cli.signatures.strangeness import Strangeness, calibration, own_left_out

PRESETS = ("default", "sim")

FALSE_ALARMS = 0.01
"""Share of inputs of known tasks that may be called unknown."""


def fit(
    features: Mapping[str, torch.Tensor], *, preset: str = "default", false_alarms: float = FALSE_ALARMS
) -> Signatures:
    """Signatures from every task's ``features``: floating [n >= 2, L, D], mean-pooled per layer, not normalised.

    "default" chooses layers, score and shrinkage by leave-one-out (see ``select``). "sim" is the published identifier
    (see ``residual``): the last layer, on features that its authors take from the pre-trained encoder. The same inputs
    give the same signatures in whatever order the tasks come. UsageError for another preset; RetexError for fewer than
    two inputs, values that are not finite, and tasks whose shapes disagree.
    """
    if preset not in PRESETS:
        raise UsageError(f"unknown preset {preset!r}", f"one of {', '.join(PRESETS)}")
    if not 0 < false_alarms < 1:
        raise UsageError(f"false_alarms is {false_alarms}, expected a share above 0 and below 1")
    check_tasks(features)
    tasks = sorted(features)
    units = [unit_layers(features[task].cpu()) for task in tasks]
    chosen = select(units) if preset == "default" else published(units)
    recipe = Recipe(preset, chosen.kind, chosen.layout, chosen.shrinkage, chosen.own, chosen.temperature, false_alarms)
    rows = [concatenate(unit, chosen.layout) for unit in units]
    parts = [scatter_of(recipe, part) for part in rows]
    scores = torch.split(chosen.scores, [len(part) for part in rows])
    own = [own_left_out(recipe, rows[t], scores[t][:, t]) for t in range(len(tasks))]
    entropies = [entropy(part, recipe.temperature) for part in scores]
    strange = Strangeness.of([torch.stack(pair, 1).float() for pair in zip(own, entropies, strict=True)])
    stored, recognised = {}, {}
    for t, task in enumerate(tasks):
        numbers = calibration(recipe, rows[t], t, parts, scores[t], own[t], strange)
        stored[task] = store(recipe, parts[t], numbers)
        recognised[task] = float((scores[t].argmin(1) == t).double().mean())
    return Signatures(recipe, stored, recognised)


def published(units: Sequence[torch.Tensor]) -> Choice:
    """The identifier of arXiv 2606.22589: final layer, unit length, SVD residual."""
    layer_count, width = units[0].shape[1:]
    layout = Layout((layer_count - 1,), (1.0,), layer_widths(units)[-1:], layer_count, width)
    scores = residual.leave_each_out([concatenate(unit, layout) for unit in units])
    return choice(layout, "residual", 0.0, 0.0, scores, owners([len(unit) for unit in units]))
