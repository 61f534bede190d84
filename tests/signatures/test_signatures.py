"""Signatures tell tasks apart, say how sure they are, survive their file, and choose without looking elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from retex_cli.errors import RetexError, UsageError
from retex_cli.signatures import Signatures, fit
from retex_cli.signatures.fit import layer_sets

WIDTH, LAYERS = 24, 5


def draw(task: int, count: int, seed: int) -> torch.Tensor:
    """Features of a task: a mean that shows in the middle layers, and noise of low rank that all tasks share."""
    generator = torch.Generator().manual_seed(1000 * task + seed)
    directions = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(7))
    place = torch.randn(LAYERS, WIDTH, generator=torch.Generator().manual_seed(50 + task))
    place *= torch.tensor([0.05, 0.4, 0.6, 0.4, 0.35])[:, None]
    noise = torch.randn(count, LAYERS, 6, generator=generator) @ directions
    return 1.5 + place + noise + 0.3 * torch.randn(count, LAYERS, WIDTH, generator=generator)


@pytest.fixture(scope="module")
def references() -> dict[str, torch.Tensor]:
    return {f"task{t}": draw(t, 48, seed=1) for t in range(4)}


@pytest.fixture(scope="module")
def held_out() -> dict[str, torch.Tensor]:
    return {f"task{t}": draw(t, 200, seed=2) for t in range(4)}


def accuracy(signatures: Signatures, held_out: dict[str, torch.Tensor]) -> float:
    hits = [
        (signatures.identify(rows).task == signatures.tasks.index(task)).double().mean().item()
        for task, rows in held_out.items()
    ]
    return sum(hits) / len(hits)


def test_tasks_are_told_apart_better_than_by_the_published_choice(
    references: dict[str, torch.Tensor], held_out: dict[str, torch.Tensor]
) -> None:
    ours, published = fit(references), fit(references, preset="sim")
    assert accuracy(ours, held_out) > 0.9
    assert accuracy(ours, held_out) > accuracy(published, held_out) + 0.2  # the last layer says little here
    assert accuracy(published, held_out) > 0.3


def test_what_is_said_of_left_out_inputs_holds_for_new_ones(
    references: dict[str, torch.Tensor], held_out: dict[str, torch.Tensor]
) -> None:
    signatures = fit(references)
    promised = sum(signatures.recognised.values()) / 4
    assert abs(promised - accuracy(signatures, held_out)) < 0.06


def test_probabilities_are_calibrated_and_sum_to_one(
    references: dict[str, torch.Tensor], held_out: dict[str, torch.Tensor]
) -> None:
    signatures = fit(references)
    decisions = signatures.identify(torch.cat(list(held_out.values())))
    assert torch.allclose(decisions.embedding.sum(1), torch.ones(800, dtype=torch.float64))
    said = decisions.probability.mean().item()
    assert abs(said - accuracy(signatures, held_out)) < 0.06
    assert (decisions.margin >= 0).all()


def test_the_published_identifier_against_its_definition(references: dict[str, torch.Tensor]) -> None:
    signatures = fit(references, preset="sim")
    query = draw(2, 10, seed=9)
    unit = query[:, -1].double().numpy()
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    scores = []
    for rows in references.values():
        last = rows[:, -1].double().numpy()
        last /= np.linalg.norm(last, axis=1, keepdims=True)
        mean = last.mean(0)
        _, _, right = np.linalg.svd(last - mean)
        basis = right[: max(1, round(0.1 * WIDTH))]
        away = unit - mean
        scores.append(np.linalg.norm(away - away @ basis.T @ basis, axis=1))
    np.testing.assert_allclose(signatures.score(query).numpy(), np.stack(scores, 1), atol=1e-5)


def test_the_file_gives_the_same_answers(
    references: dict[str, torch.Tensor], held_out: dict[str, torch.Tensor]
) -> None:
    for preset in ("default", "sim"):
        signatures = fit(references, preset=preset)
        back = Signatures.from_tensors(signatures.to_tensors(), signatures.to_metadata())
        rows = torch.cat(list(held_out.values()))
        assert (back.identify(rows).task == signatures.identify(rows).task).double().mean() > 0.99
        again = Signatures.from_tensors(back.to_tensors(), back.to_metadata())
        assert torch.equal(again.identify(rows).task, back.identify(rows).task)


def test_inputs_that_share_a_task_are_surer_together(
    references: dict[str, torch.Tensor], held_out: dict[str, torch.Tensor]
) -> None:
    signatures = fit(references)
    for index, (task, rows) in enumerate(held_out.items()):
        for start in range(0, 160, 16):
            together = signatures.identify_batch(rows[start : start + 16])
            assert together.task.tolist() == [index], task


def test_inputs_unlike_any_reference_are_unknown(
    references: dict[str, torch.Tensor], held_out: dict[str, torch.Tensor]
) -> None:
    signatures = fit(references)
    known = signatures.identify(torch.cat(list(held_out.values()))).unknown.double().mean()
    far = -draw(0, 50, seed=3) + 4 * torch.randn(50, LAYERS, WIDTH, generator=torch.Generator().manual_seed(0))
    assert known < 0.08
    assert signatures.identify(far).unknown.double().mean() > 0.9


def test_order_of_tasks_and_repetition_change_nothing(references: dict[str, torch.Tensor]) -> None:
    first, second = fit(references), fit(dict(reversed(references.items())))
    assert first.tasks == second.tasks
    assert first.to_metadata() == second.to_metadata()
    for name, tensor in first.to_tensors().items():
        assert torch.equal(tensor, second.to_tensors()[name])


def test_duplicates_and_single_tasks_are_fine(references: dict[str, torch.Tensor]) -> None:
    same = {"a": references["task0"][:1].repeat(32, 1, 1), "b": references["task1"]}
    assert fit(same).identify(references["task0"][:1]).task.tolist() == [0]
    alone = fit({"only": references["task0"]})
    assert alone.identify(references["task1"]).task.unique().tolist() == [0]


def test_layer_sets_hold_singles_spreads_and_all() -> None:
    sets = layer_sets(7)
    assert (4,) in sets
    assert (0, 2, 4, 6) in sets
    assert tuple(range(7)) in sets


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ({}, "no task"),
        ({"a": torch.randn(1, 3, 4)}, "at least 2"),
        ({"a": torch.randn(9, 3, 4), "b": torch.randn(9, 2, 4)}, "task 'b' has 2 layers"),
        ({"a": torch.full((9, 3, 4), float("nan"))}, "NaN"),
    ],
)
def test_unusable_features_are_refused(features: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(RetexError, match=words):
        fit(features)


def test_another_encoder_and_another_preset_are_refused(references: dict[str, torch.Tensor]) -> None:
    with pytest.raises(RetexError, match="the signatures have"):
        fit(references).score(torch.randn(3, LAYERS, WIDTH + 1))
    with pytest.raises(UsageError, match="preset"):
        fit(references, preset="magic")
