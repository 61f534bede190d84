"""How strange an input looks, from its distance to the nearest task and from how torn it is between tasks.

The two signs and their sum are explained in ``calibrate``. The distance is that of ``scorer.OwnDistance``, or the score
itself where that is the residual.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from retex_cli.signatures import scorer
from retex_cli.signatures.calibrate import Tail, entropy, location_and_spread
from retex_cli.signatures.recipe import Recipe
from retex_cli.signatures.scatter import Scatter

OwnOf = Callable[[int], scorer.OwnDistance]


@dataclass(frozen=True, slots=True)
class Strangeness:
    """Turns distance and entropy into one surprise: the reference inputs' ``-log p`` of both, summed."""

    centres: torch.Tensor
    spreads: torch.Tensor
    distance: Tail
    entropy: Tail

    @classmethod
    def of(cls, calibration: Sequence[torch.Tensor]) -> Strangeness:
        """From every task's reference inputs: columns own distance and entropy, each input left out."""
        places = [location_and_spread(part[:, 0].double()) for part in calibration]
        standard = [(part[:, 0].double() - c) / s for part, (c, s) in zip(calibration, places, strict=True)]
        return cls(
            centres=torch.tensor([centre for centre, _ in places], dtype=torch.float64),
            spreads=torch.tensor([spread for _, spread in places], dtype=torch.float64),
            distance=Tail.of(torch.cat(standard)),
            entropy=Tail.of(torch.cat([part[:, 1] for part in calibration])),
        )

    def surprise(self, distance: torch.Tensor, task: torch.Tensor, entropies: torch.Tensor) -> torch.Tensor:
        """``[m]`` in nats for ``distance`` [m] to the tasks ``task`` [m], and ``entropies`` [m]."""
        standard = (distance.double() - self.centres[task]) / self.spreads[task]
        return self.distance.surprise(standard) + self.entropy.surprise(entropies)


def nearest_distance(recipe: Recipe, own_of: OwnOf, rows: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Distance ``[m]`` of float32 ``rows`` [m, D] to the task of their smallest score in ``scores`` [m, T]."""
    nearest = scores.argmin(1)
    if recipe.score == "residual":
        return scores.gather(1, nearest[:, None])[:, 0]
    tasks = sorted(set(nearest.tolist()))
    if len(tasks) == 1:
        return own_of(tasks[0]).of_rows(rows)
    distance = torch.empty(len(rows))
    for task in tasks:
        mine = nearest == task
        distance[mine] = own_of(task).of_rows(rows[mine])
    return distance


def own_left_out(recipe: Recipe, rows: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """Distance ``[n]`` of a task's float64 ``rows`` to the task without them; ``column`` [n]: left-out scores there."""
    return column if recipe.score == "residual" else scorer.own_left_out(rows)


def calibration(
    recipe: Recipe,
    rows: torch.Tensor,
    owner: int,
    parts: Sequence[Scatter],
    scores: torch.Tensor,
    own: torch.Tensor,
    strange: Strangeness,
) -> torch.Tensor:
    """Float64 [n, 3] as ``StoredTask`` keeps it, for one task's float64 ``rows`` [n, D] with left-out ``scores`` [n, T]
    and left-out distances ``own`` [n]."""
    nearest = scores.argmin(1)
    entropies = entropy(scores, recipe.temperature)
    wrong = nearest != owner
    found = own.clone()
    if wrong.any():
        taken = nearest_distance(
            recipe, lambda task: scorer.OwnDistance.of(parts[task]), rows[wrong].float(), scores[wrong]
        )
        found[wrong] = taken.double()
    return torch.stack([own, entropies, strange.surprise(found, nearest, entropies)], 1)
