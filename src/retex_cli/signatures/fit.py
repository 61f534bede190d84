"""Fitting signatures: layers, score and shrinkage chosen by leave-one-out on the reference inputs, nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retex_cli.errors import UsageError
from retex_cli.signatures import gaussian
from retex_cli.signatures.features import Layout, check_tasks, concatenate, layer_weights, unit_layers
from retex_cli.signatures.scatter import Scatter, scatter
from retex_cli.signatures.signatures import GAUSSIAN, RESIDUAL, Recipe, Signatures, residual_norm

PRESETS = ("default", "sim")
SHRINKAGES = (0.9, 0.75, 0.5, 0.3, 0.15)
OWN_SHARES = (0.0, 0.1, 0.25, 0.5)
FIRST = ((0.75, 0.25),)
"""Layers are compared at this shrinkage and own share; then the others are tried on the best layers."""
TEMPERATURES = tuple(2.0 ** (k / 4) for k in range(-24, 41))
FALSE_ALARMS = 0.01
"""Share of in-distribution inputs that may be called unknown."""


def fit(features: Mapping[str, Tensor], *, preset: str = "default") -> Signatures:
    """Signatures of every task's ``features`` [n >= 2, layers, width].

    ``sim`` is the published identifier (arXiv 2606.22589): last layer, SVD residual, rank min(max(1, D / 10), n - 1).
    ``default`` chooses among layer sets and the regularised discriminants of ``gaussian`` the one whose left-out inputs
    get the highest probability for their own task. RetexError for unusable features, UsageError for another preset.
    """
    check_tasks(features)
    if preset not in PRESETS:
        raise UsageError(f"unknown preset {preset!r}", f"one of {', '.join(PRESETS)}")
    ordered = {task: features[task] for task in sorted(features)}
    return _published(ordered) if preset == "sim" else _chosen(ordered)


def layer_sets(count: int) -> list[tuple[int, ...]]:
    """Each layer alone, a few even spreads from the first to the last, and all of them."""
    spreads = {tuple(round(k * (count - 1) / (parts - 1)) for k in range(parts)) for parts in range(2, min(count, 8))}
    return [*((layer,) for layer in range(count)), *sorted(spreads, key=len), tuple(range(count))]


@dataclass(frozen=True)
class _Trial:
    """One choice and the scores [N, T] that it gives every reference input when that is left out."""

    layout: Layout
    shrinkage: float
    own: float
    scores: Tensor
    temperature: float
    loss: float


def _calibrate(scores: Tensor, owner: Tensor) -> tuple[float, float]:
    """The temperature at which the softmax of minus scores is most likely right, and its mean negative log-likelihood.

    The differences of scores between tasks grow with the number of dimensions, so the ladder is relative to them.
    """
    if scores.shape[1] == 1:
        return 1.0, 0.0
    ordered = scores.sort(1).values
    unit = max(float((ordered[:, 1] - ordered[:, 0]).median()), 1e-12)
    losses = [float(torch.nn.functional.cross_entropy(-scores / (unit * t), owner)) for t in TEMPERATURES]
    best = min(range(len(losses)), key=losses.__getitem__)
    return unit * TEMPERATURES[best], losses[best]


def _owners(features: Mapping[str, Tensor]) -> Tensor:
    counts = torch.tensor([len(rows) for rows in features.values()])
    return torch.repeat_interleave(torch.arange(len(counts)), counts)


def _chosen(features: Mapping[str, Tensor]) -> Signatures:
    units = [unit_layers(rows) for rows in features.values()]
    layer_count, width = units[0].shape[1:]
    weights, owner = layer_weights(units), _owners(features)
    best: _Trial | None = None
    for layers in dict.fromkeys(layer_sets(layer_count)):
        layout = Layout(layers, tuple(weights[layer] for layer in layers), layer_count, width)
        best = _better(best, _trials(layout, units, owner, FIRST))
    assert best is not None
    others = [(shrinkage, own) for shrinkage in SHRINKAGES for own in OWN_SHARES if (shrinkage, own) not in FIRST]
    best = _better(best, _trials(best.layout, units, owner, others))
    scatters = {task: scatter(concatenate(unit, best.layout)) for task, unit in zip(features, units, strict=True)}
    return _finish("default", GAUSSIAN, best, features, scatters, owner)


def _better(best: _Trial | None, trials: Sequence[_Trial]) -> _Trial:
    return min([*([best] if best else []), *trials], key=lambda trial: trial.loss)


def _trials(
    layout: Layout, units: Sequence[Tensor], owner: Tensor, choices: Sequence[tuple[float, float]]
) -> list[_Trial]:
    rows = [concatenate(unit, layout) for unit in units]
    small = gaussian.compact(rows)
    size = rows[0].shape[1]
    within = sum(float((part - part.mean(0)).square().sum()) for part in rows)
    variance = max(within / (len(owner) * size), 1e-9)
    trials = []
    for shrinkage, own in choices:
        chosen = gaussian.weights([len(part) for part in rows], variance, shrinkage, own)
        scores = gaussian.leave_each_out(small, chosen)
        trials.append(_Trial(layout, shrinkage, own, scores, *_calibrate(scores, owner)))
    return trials


def _published(features: Mapping[str, Tensor]) -> Signatures:
    """Rows of unit length in the last layer; each left-out input is scored by its own task without it."""
    some = next(iter(features.values()))
    layer_count, width = some.shape[1:]
    layout = Layout((layer_count - 1,), (1.0,), layer_count, width)
    rows = [concatenate(unit_layers(part), layout) for part in features.values()]
    wanted = max(1, round(0.1 * width))
    parts = [scatter(part, min(wanted, len(part) - 1)) for part in rows]
    scores = torch.stack([residual_norm(torch.cat(rows), part.mean, part.basis) for part in parts], 1)
    start = 0
    for task, part in enumerate(rows):
        for index in range(len(part)):
            if len(part) > 2:
                rest = scatter(torch.cat([part[:index], part[index + 1 :]]), min(wanted, len(part) - 2))
                scores[start + index, task] = residual_norm(part[index : index + 1], rest.mean, rest.basis)[0]
        start += len(part)
    owner = _owners(features)
    trial = _Trial(layout, 0.0, 0.0, scores, *_calibrate(scores, owner))
    return _finish("sim", RESIDUAL, trial, features, dict(zip(features, parts, strict=True)), owner)


def _finish(
    preset: str,
    score: str,
    trial: _Trial,
    features: Mapping[str, Tensor],
    scatters: Mapping[str, Scatter],
    owner: Tensor,
) -> Signatures:
    """Calibrate the out-of-distribution rule on left-out inputs and put everything together."""
    own = trial.scores.gather(1, owner[:, None])[:, 0]
    hits = trial.scores.argmin(1) == owner
    centre, spread = {}, {}
    for index, task in enumerate(features):
        mine = own[owner == index]
        centre[task] = float(mine.median())
        spread[task] = max(float((mine - mine.median()).abs().median()) * 1.4826, 1e-9)
    strangeness = torch.cat(
        [(own[owner == index] - centre[task]) / spread[task] for index, task in enumerate(features)]
    )
    threshold = float(strangeness.quantile(1 - FALSE_ALARMS))
    recipe = Recipe(
        preset=preset,
        score=score,
        layers=trial.layout.layers,
        weights=trial.layout.weights,
        layer_count=trial.layout.layer_count,
        width=trial.layout.width,
        shrinkage=trial.shrinkage,
        own=trial.own,
        temperature=trial.temperature,
        threshold=threshold,
        false_alarms=float((strangeness > threshold).double().mean()),
        centre=centre,
        spread=spread,
        recognised={task: float(hits[owner == index].double().mean()) for index, task in enumerate(features)},
        counts={task: len(rows) for task, rows in features.items()},
    )
    return Signatures(recipe, scatters)
