"""The harness around the identifiers: draws, lookups, means, and the area under the curve."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import blends
import identify
import layerwise
import numpy as np
import pytest
import suite_runs
import torch
import unseen


def test_draws_do_not_overlap_where_there_are_enough_rows() -> None:
    rows = torch.arange(800)
    draws = [suite_runs.draw(rows, 256, number) for number in range(3)]
    assert sorted(torch.cat(draws).tolist()) == list(range(768))
    assert suite_runs.draw(rows, 32, 1).tolist() == list(range(256, 288))


def test_draws_of_few_rows_are_all_of_them_or_apart() -> None:
    rows = torch.arange(240)
    assert sorted(suite_runs.draw(rows, 256, 2).tolist()) == list(range(240))
    assert suite_runs.draw(rows, 32, 2).tolist() == list(range(160, 192))


def test_shares_are_looked_up() -> None:
    """Four inputs of task a; the third goes to b, whose encoder gets it wrong, and whose head says another name."""
    suite = SimpleNamespace(tasks=["a", "b"], answered=lambda task: list(range(4)))
    truth = np.array(["x", "x", "y", "y"])
    ours = {
        "truth": truth,
        "expert": truth,
        "E:a": np.array(["x", "x", "y", "x"]),
        "H:a": np.array(["x", "x", "y", "x"]),
    }
    theirs = {"E:b": np.array(["x", "x", "x", "x"]), "H:b": np.array(["p", "p", "p", "p"])}
    b = {key: np.array(["p"] * 4) for key in ("truth", "expert", "E:a", "H:a", "E:b", "H:b")}
    scores = torch.tensor([[0.0, 1], [0, 1], [1, 0], [0, 1]])
    entry = identify.judged(suite, {"a": {**ours, **theirs}, "b": b}, {"a": scores, "b": 1 - scores})
    assert entry["accuracy"] == {"a": 0.75, "b": 0.75}
    assert entry["E"]["a"] == entry["H"]["a"] == pytest.approx(2 / 3)
    assert entry["E_expert"]["a"] == pytest.approx(2 / 4)


def test_what_several_experts_answered_counts_in_place_of_the_nearest_ones() -> None:
    suite = SimpleNamespace(tasks=["a"], answered=lambda task: [0, 2, 3])
    answers = {
        "a": {"truth": np.array(["x", "x", "y"]), **dict.fromkeys(("expert", "E:a", "H:a"), np.array(["x"] * 3))}
    }
    mixed = {"E": {"a": {2: "y"}}, "H": {"a": {0: "z", 1: "x"}}}
    entry = identify.judged(suite, answers, {"a": torch.zeros(4, 1)}, mixed)
    assert entry["E"]["a"] == pytest.approx(3 / 2)
    assert entry["H"]["a"] == pytest.approx(1 / 2)
    assert entry["accuracy"]["a"] == 1


def test_experts_are_run_on_what_has_not_been_asked_before(tmp_path: Path) -> None:
    runs: list[tuple[str, list[str]]] = []

    def before_head(network: str, rows: list[str]) -> torch.Tensor:
        runs.append((network, rows))
        return torch.tensor([[float(row[1:])] for row in rows])

    suite = SimpleNamespace(
        tasks=["a", "b"],
        cache=tmp_path,
        answered=lambda task: [1, 3, 5],
        test=lambda task: [f"{task}{i}" for i in range(6)],
        recovered=lambda expert: f"network of {expert}",
        before_head=before_head,
    )
    first = blends.states(suite, "a", {"a": [2], "b": []})
    assert {task: {i: float(v) for i, v in of.items()} for task, of in first.items()} == {"a": {2: 5.0}, "b": {}}
    second = blends.states(suite, "a", {"a": [0, 2], "b": [1]})
    assert {task: {i: float(v) for i, v in of.items()} for task, of in second.items()} == {
        "a": {2: 5.0, 0: 1.0},
        "b": {1: 3.0},
    }
    assert runs == [("network of a", ["a5"]), ("network of a", ["a1"]), ("network of a", ["b3"])]
    assert blends.states(suite, "a", {"a": [0]})["b"].keys() == {1}
    assert len(runs) == 3


def test_batches_are_summed() -> None:
    scores = torch.tensor([[0.0, 1.0]] * 15 + [[100.0, 0.0]])
    assert 0 < identify.wrong_batches(scores, 0) < identify.BATCHES
    assert identify.wrong_batches(scores[:15], 0) == 0
    assert identify.wrong_batches(scores[:15], 1) == identify.BATCHES


def test_means_over_draws_and_tasks() -> None:
    entries = [
        {"accuracy": {"a": 0.5, "b": 1.0}, "batches": {"a": 1.0, "b": 0.0}, "ms": 1.0, "commit": "c"},
        {"accuracy": {"a": 0.7, "b": 1.0}, "batches": {"a": 0.0, "b": 0.0}, "ms": 3.0, "commit": "c"},
    ]
    found = identify.mean(entries)
    assert found["accuracy_mean"] == pytest.approx(0.8)
    assert found["accuracy_worst"] == pytest.approx(0.6)
    assert (found["wrong_batches"], found["tried_batches"]) == (1, 2 * 2 * identify.BATCHES)
    assert (found["ms"], found["draws"], found["commit"]) == (2.0, 2, "c")


def test_which_layer_a_weight_reads() -> None:
    assert layerwise.reads("encoder.layer.3.attention.self.key.weight") == 3
    assert layerwise.reads("_blocks.5._expand_conv.weight") == 4
    assert layerwise.reads("encoder.layer.3.output.dense.weight") is None


def test_area_under_the_curve() -> None:
    assert unseen.auroc(torch.tensor([0.0, 1, 2, 3]), torch.tensor([1.5, 9])) == (0.5 + 1) / 2
    assert unseen.auroc(torch.zeros(5), torch.zeros(3)) == 0.5
    known, unknown = torch.rand(40), torch.rand(30) + 0.2
    pairs = (unknown[:, None] > known).double().mean().item()
    assert unseen.auroc(known, unknown) == pytest.approx(pairs)


def test_a_probe_learns_what_can_be_told() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = ["a", "b"] * 60
    rows = torch.randn(120, 8, generator=generator) + torch.tensor([[2.0], [-2.0]] * 60) * torch.eye(8)[0]
    assert unseen.probe(rows[:80], labels[:80], rows[80:], labels[80:]) > 0.9
    assert unseen.probe(torch.randn(80, 8, generator=generator), labels[:80], rows[80:], labels[80:]) < 0.8
