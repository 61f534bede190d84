from __future__ import annotations

import torch

from retex_cli.signatures.features import unit_layers
from retex_cli.signatures.select import Judge, clearly_better, evenly, layer_sets, select


def test_even_spacings() -> None:
    assert evenly(7, 4) == (0, 2, 4, 6)
    assert evenly(13, 4) == (0, 4, 8, 12)
    assert evenly(3, 4) == (0, 1, 2)
    assert evenly(1, 2) == (0,)


def test_layer_sets_start_with_the_preferred_one_and_repeat_nothing() -> None:
    sets = layer_sets(7)
    assert sets[0] == (0, 2, 4, 6)
    assert {(0, 6), (0, 3, 6), (1, 3, 5), tuple(range(7)), (0,), (6,)} <= set(sets)
    assert len(sets) == len(set(sets))
    assert layer_sets(1) == [(0,)]
    assert max(map(len, layer_sets(25))) == 8


def test_layers_that_know_nothing_are_left_out(clouds) -> None:
    """Four layers of which only the second tells the tasks apart, and the others drown it."""
    features = clouds("abc", 40, layers=5, width=24, gap=0.4)
    noise = torch.Generator().manual_seed(9)
    for part in features.values():
        for layer in (0, 1, 3, 4):
            part[:, layer] = torch.randn(40, 24, generator=noise)
    chosen = select([unit_layers(part) for part in features.values()])
    assert chosen.layout.layers == (2,)


def test_the_preferred_layers_stay_where_all_layers_know_the_same(clouds) -> None:
    features = clouds("abc", 40, layers=1, width=24, gap=0.4)
    chosen = select([unit_layers(part.repeat(1, 7, 1)) for part in features.values()])
    assert chosen.layout.layers == (0, 2, 4, 6)


def test_tuning_never_does_worse_than_the_usual_numbers(clouds) -> None:
    judge = Judge([unit_layers(part) for part in clouds("abcd", 24, gap=0.3).values()])
    assert judge.tuned((0, 1, 2)).loss <= judge.screened((0, 1, 2)).loss


def test_two_halves_of_one_task_are_not_told_apart(clouds) -> None:
    """In 60 dimensions 12 inputs each are separated with ease, but not one that was left out."""
    halves = [unit_layers(clouds("a", 12, layers=2, width=60, seed=seed)["a"]) for seed in (0, 1)]
    chosen = select(halves)
    right = (chosen.scores.argmin(1) == torch.arange(2).repeat_interleave(12)).double().mean()
    assert right < 0.75
    assert chosen.loss > 0.5


def test_clearly_better_needs_two_standard_errors(clouds) -> None:
    units = [unit_layers(part) for part in clouds("ab", 30, gap=0.4).values()]
    judge = Judge(units)
    one, other = judge.screened((0, 1, 2)), judge.screened((1,))
    assert clearly_better(one, other)
    assert not clearly_better(other, one)
    assert not clearly_better(one, one)
