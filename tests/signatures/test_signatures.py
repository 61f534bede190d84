"""Signatures tell tasks apart, say how sure they are, survive their file, and choose without looking elsewhere."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from retex_cli.errors import RetexError, UsageError
from retex_cli.signatures import Signatures, fit, gaussian, scorer, storage
from retex_cli.signatures.features import concatenate, unit_layers
from retex_cli.signatures.scatter import floored, scatter
from retex_cli.signatures.select import select
from retex_cli.signatures.signatures import ASKED, HEDGE, UNSURE

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


def test_several_experts_are_asked_where_the_nearest_task_is_unsure(
    references: dict[str, torch.Tensor], held_out: dict[str, torch.Tensor]
) -> None:
    few = fit({task: rows[:8] for task, rows in references.items()})
    rows = torch.cat(list(held_out.values()))
    decisions, weights = few.identify(rows), few.soft(rows, HEDGE * few.recipe.temperature)
    unsure = decisions.probability < UNSURE
    assert 50 < unsure.sum() < 700
    assert torch.equal(decisions.shares.argmax(1), decisions.task)
    assert (decisions.shares[~unsure].amax(1) == 1).all()
    assert ((decisions.shares[unsure] > 0).sum(1) == ASKED).all()
    expected = torch.where(weights < weights.topk(ASKED, dim=1).values[:, -1:], 0.0, weights)
    torch.testing.assert_close(decisions.shares[unsure], (expected / expected.sum(1, keepdim=True))[unsure])
    torch.testing.assert_close(decisions.shares.sum(1), torch.ones(800, dtype=torch.float64))


def test_a_single_task_answers_alone(references: dict[str, torch.Tensor]) -> None:
    alone = fit({"only": references["task0"]})
    assert alone.identify(references["task1"]).shares.unique().tolist() == [1.0]


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
    np.testing.assert_allclose(signatures.score(query).numpy(), np.stack(scores, 1), atol=1e-4)


@pytest.mark.parametrize("preset", ["default", "sim"])
def test_the_file_gives_the_same_answers_bit_for_bit(
    references: dict[str, torch.Tensor], held_out: dict[str, torch.Tensor], preset: str, tmp_path: Path
) -> None:
    signatures = fit(references, preset=preset)
    save_file(signatures.to_tensors(), tmp_path / "signatures.safetensors")
    metadata = json.loads(json.dumps(signatures.to_metadata(), allow_nan=False))
    back = Signatures.from_tensors(load_file(tmp_path / "signatures.safetensors"), metadata)
    rows = torch.cat(list(held_out.values()))
    ours, theirs = signatures.identify(rows), back.identify(rows)
    for name in ("task", "probability", "margin", "unknown", "embedding", "shares", "surprise"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(signatures.score(rows), back.score(rows))
    assert back.to_metadata() == signatures.to_metadata()


def exact_scores(
    references: dict[str, torch.Tensor], signatures: Signatures, rows: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What selection would give ``rows``, in float64 from the reference inputs, and those as it saw them."""
    recipe, layout = signatures.recipe, signatures.layout
    parts = [concatenate(unit_layers(references[task]), layout) for task in signatures.tasks]
    means, centred = gaussian.centre(parts)
    size = sum(len(part) for part in parts) * layout.size
    variance = floored(sum(float((part * part).sum()) for part in centred) / size, 0.0)
    weights = gaussian.weights([len(part) for part in parts], variance, recipe.shrinkage, recipe.own)
    white = gaussian.whiten(means, centred, weights)
    return gaussian.distances(white, white.into(concatenate(unit_layers(rows), layout))), parts


def across(scores: torch.Tensor) -> torch.Tensor:
    return (scores - scores.mean(1, keepdim=True)).double()


def test_few_own_directions_score_nearly_as_all_of_them(clouds, monkeypatch: pytest.MonkeyPatch) -> None:
    """130 inputs have 129 directions of their own, of which 64 are looked at."""
    signatures = fit(clouds("abc", 130, width=60, gap=0.15))
    rows = torch.cat(list(clouds("abc", 200, width=60, gap=0.15, seed=1).values()))
    few, said = signatures.score(rows), signatures.identify(rows)
    monkeypatch.setattr(scorer, "OWN_DIRECTIONS", 500)
    whole = replace(signatures)
    every = whole.score(rows)
    assert 0 < (across(few) - across(every)).abs().max() < 0.1 * across(every).abs().max()
    assert (few.argmin(1) == every.argmin(1)).double().mean() > 0.97
    assert (said.unknown == whole.identify(rows).unknown).double().mean() > 0.9


@pytest.mark.parametrize("count", [8, 48])
def test_what_is_scored_is_what_was_selected(
    references: dict[str, torch.Tensor], held_out: dict[str, torch.Tensor], count: int
) -> None:
    """Stored in bytes, scored in single precision, in all dimensions (48 inputs) or in the span of the bases (8)."""
    few = {task: rows[:count] for task, rows in references.items()}
    signatures = fit(few)
    rows = torch.cat(list(held_out.values()))
    exact, found = exact_scores(few, signatures, rows)[0], signatures.score(rows)
    error = (across(found) - across(exact)).abs()
    assert error.max() < 0.02 * across(exact).abs().max()
    assert error.square().mean().sqrt() < 0.01 * across(exact).square().mean().sqrt()
    assert (found.argmin(1) == exact.argmin(1)).double().mean() > 0.99
    assert not torch.equal(across(found), across(exact))


def test_selection_judged_the_scores_of_refits(references: dict[str, torch.Tensor]) -> None:
    """Leaving an input out for real, at the chosen numbers, gives almost the score it was judged by: the weights of
    the sums of squares differ by one input in 48."""
    chosen = select([unit_layers(rows) for rows in references.values()])
    signatures = fit(references)
    assert signatures.layout == chosen.layout
    for i in (0, 17, 40):
        rest = {**references, "task2": torch.cat([references["task2"][:i], references["task2"][i + 1 :]])}
        refit = exact_scores(rest, signatures, references["task2"][i : i + 1])[0]
        torch.testing.assert_close(across(refit), across(chosen.scores[2 * 48 + i][None]), rtol=0.08, atol=0.5)


def test_a_file_holds_statistics_and_not_the_inputs(references: dict[str, torch.Tensor]) -> None:
    tensors = fit(references).to_tensors()
    assert {name.split("/")[1] for name in tensors} == {
        "mean", "basis", "scale", "spectrum", "residual", "calibration",
    }  # fmt: skip
    signatures = fit(references)
    inputs = concatenate(unit_layers(references["task0"]), signatures.layout)
    basis = signatures.stored["task0"].scatter().basis
    centred = inputs - inputs.mean(0)
    alike = (basis / basis.norm(dim=1, keepdim=True)) @ (centred / centred.norm(dim=1, keepdim=True)).T
    assert alike.abs().max() < 0.95


@pytest.mark.parametrize("count", [128, 256, 300])
def test_a_task_takes_less_than_half_a_hundredth_of_a_90_mb_expert(count: int) -> None:
    rows = torch.randn(count, 4 * 384, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stored = storage.store(scatter(rows), torch.zeros(count, 3), small=True)
    assert stored.nbytes < 0.005 * 90e6


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


@pytest.mark.parametrize("preset", ["default", "sim"])
def test_a_task_joins_from_its_own_inputs_and_leaves_again(
    references: dict[str, torch.Tensor], held_out: dict[str, torch.Tensor], preset: str
) -> None:
    three = fit({task: rows for task, rows in references.items() if task != "task1"}, preset=preset)
    joined = three.add("task1", references["task1"])
    assert joined.tasks == tuple(references)
    before, after = three.to_tensors(), joined.to_tensors()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert {name.split("/")[0] for name in set(after) - set(before)} == {"task1"}
    whole = fit(references, preset=preset)
    assert accuracy(joined, held_out) > accuracy(whole, held_out) - 0.03
    assert abs(joined.recognised["task1"] - whole.recognised["task1"]) < 0.1
    left = joined.remove("task1")
    assert left.tasks == three.tasks
    assert left.to_metadata() == three.to_metadata()
    assert torch.equal(left.score(held_out["task0"]), three.score(held_out["task0"]))


def test_a_second_task_brings_a_temperature(
    references: dict[str, torch.Tensor], held_out: dict[str, torch.Tensor]
) -> None:
    pair = fit({"task0": references["task0"]}).add("task3", references["task3"])
    decisions = pair.identify(torch.cat([held_out["task0"], held_out["task3"]]))
    right = (decisions.task == torch.arange(2).repeat_interleave(200)).double().mean().item()
    assert right > 0.9
    assert abs(decisions.probability.mean().item() - right) < 0.1


def test_joining_and_leaving_refuse_what_cannot_be_meant(references: dict[str, torch.Tensor]) -> None:
    signatures = fit(references)
    with pytest.raises(RetexError, match="already"):
        signatures.add("task1", references["task1"])
    with pytest.raises(RetexError, match="task 'new': 1 inputs"):
        signatures.add("new", references["task1"][:1])
    with pytest.raises(RetexError, match="task 'new': 4 layers"):
        signatures.add("new", references["task1"][:, :4])
    with pytest.raises(RetexError, match="no signature of task 'tsk1'") as caught:
        signatures.remove("tsk1")
    assert "task1" in str(caught.value.hint)
    with pytest.raises(RetexError, match="only one"):
        fit({"only": references["task0"]}).remove("only")


def test_a_soft_embedding_is_the_probabilities_unless_softened(references: dict[str, torch.Tensor]) -> None:
    signatures, rows = fit(references), draw(0, 5, seed=4)
    torch.testing.assert_close(signatures.soft(rows), signatures.identify(rows).embedding)
    softer = signatures.soft(rows, 100 * signatures.recipe.temperature)
    assert softer.amax(1).max() < signatures.soft(rows).amax(1).min()


@pytest.mark.parametrize("count", [2, 3, 32])
def test_few_inputs_are_enough_to_run(references: dict[str, torch.Tensor], count: int) -> None:
    for preset in ("default", "sim"):
        signatures = fit({task: rows[:count] for task, rows in references.items()}, preset=preset)
        decisions = signatures.identify(draw(1, 7, seed=5))
        assert decisions.embedding.isfinite().all()
        assert decisions.surprise.isfinite().all()
        assert signatures.alarm.expected >= 1 / (4 * count + 1)


def test_tasks_may_have_different_numbers_of_inputs(
    references: dict[str, torch.Tensor], held_out: dict[str, torch.Tensor]
) -> None:
    uneven = {task: rows[: 12 * (t + 1)] for t, (task, rows) in enumerate(references.items())}
    signatures = fit(uneven)
    tasks = signatures.to_metadata()["tasks"]
    assert isinstance(tasks, dict)
    assert [tasks[task]["inputs"] for task in signatures.tasks] == [12, 24, 36, 48]
    assert accuracy(signatures, held_out) > 0.85


def test_more_inputs_than_directions_are_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    wide = {task: torch.randn(300, 2, 160, generator=generator) + shift for task, shift in (("a", 0.0), ("b", 0.3))}
    signatures = fit(wide)
    assert signatures.stored["a"].basis.shape[0] == 256
    assert signatures.stored["a"].residual.item() > 0
    fresh = torch.randn(200, 2, 160, generator=generator) + 0.3
    assert (signatures.identify(fresh).task == 1).double().mean() > 0.95


def test_what_repeats_an_identical_reference_is_known_and_anything_else_is_not(
    references: dict[str, torch.Tensor],
) -> None:
    same = {"a": references["task0"][:1].repeat(32, 1, 1), "b": references["task1"][:1].repeat(32, 1, 1)}
    for preset in ("default", "sim"):
        signatures = fit(same, preset=preset)
        decisions = signatures.identify(torch.cat([same["a"][:2], same["b"][:2], references["task2"][:5]]))
        assert decisions.task[:4].tolist() == [0, 0, 1, 1]
        assert decisions.unknown.tolist() == 4 * [False] + 5 * [True]


def test_a_task_nobody_fitted_is_unknown_as_a_batch(
    references: dict[str, torch.Tensor], held_out: dict[str, torch.Tensor]
) -> None:
    signatures = fit({task: rows for task, rows in references.items() if task != "task3"})
    assert signatures.identify_batch(held_out["task3"][:32]).unknown.tolist() == [True]
    for task in signatures.tasks:
        for start in range(0, 192, 32):
            assert not signatures.identify_batch(held_out[task][start : start + 32]).unknown.item(), (task, start)


def test_the_alarm_rate_is_the_one_asked_for(
    references: dict[str, torch.Tensor], held_out: dict[str, torch.Tensor]
) -> None:
    signatures = fit(references, false_alarms=0.1)
    assert signatures.alarm.expected == pytest.approx(0.1, abs=0.01)
    rate = signatures.identify(torch.cat(list(held_out.values()))).unknown.double().mean().item()
    assert 0.02 < rate < 0.2
    with pytest.raises(UsageError, match="false_alarms"):
        fit(references, false_alarms=1.0)


def test_a_lone_task_is_certain_and_has_no_margin_to_anything(references: dict[str, torch.Tensor]) -> None:
    decisions = fit({"only": references["task0"]}).identify(references["task0"])
    assert decisions.probability.tolist() == 48 * [1.0]
    assert decisions.margin.isinf().all()
    assert decisions.unknown.double().mean() < 0.05


def test_damaged_recipes_are_refused_with_the_field(references: dict[str, torch.Tensor]) -> None:
    signatures = fit(references)
    tensors, good = signatures.to_tensors(), signatures.to_metadata()
    for change, words in (
        ({"temperature": "warm"}, "temperature is 'warm'"),
        ({"temperature": 0}, "temperature is 0"),
        ({"layers": [9], "weights": [1.0], "widths": [3]}, r"layers \[9\]"),
        ({"layers": [0, 1], "weights": [1.0], "widths": [3, 3]}, "1 weights"),
        ({"score": "magic"}, "score is 'magic'"),
        ({"tasks": {}}, "tasks is"),
        ({"tasks": {"lost": {"recognised": 1.0}}}, "no tensor 'lost/mean'"),
        ({"width": 7}, "at most 7"),
        ({"widths": [WIDTH, WIDTH, WIDTH, 5]}, "expected"),
    ):
        with pytest.raises(RetexError, match=words):
            Signatures.from_tensors(tensors, {**good, **change})
    with pytest.raises(RetexError, match="no 'weights'"):
        Signatures.from_tensors(tensors, {name: value for name, value in good.items() if name != "weights"})


def test_the_report_says_what_was_chosen(references: dict[str, torch.Tensor]) -> None:
    signatures = fit(references)
    words = signatures.describe()
    assert words["layers"] == " ".join(map(str, signatures.layout.layers))
    assert words["score"] == "mahalanobis"
    assert "95 %" in str(words["false alarms"])
    assert "shrinkage" not in fit(references, preset="sim").describe()


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
