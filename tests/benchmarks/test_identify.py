"""The harness around the identifiers: draws, lookups, means, and the area under the curve."""

from __future__ import annotations

from types import SimpleNamespace

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
