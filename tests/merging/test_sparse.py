"""TIES and DARE against their papers: worked by hand, and against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from retex_cli.merging.memory import merge_tensors


def reference_trim(taus: Tensor, density: float) -> Tensor:
    """Keep the top k entries by magnitude of each row of ``taus [T, n]``, k = density * n rounded down, at least 1."""
    trimmed = []
    for tau in taus:
        k = max(1, int(density * tau.numel()))
        cut = tau.abs().sort(descending=True).values[k - 1] if tau.numel() else 0
        trimmed.append(torch.where(tau.abs() >= cut, tau, torch.zeros_like(tau)))
    return torch.stack(trimmed)


def reference_elect_and_mean(taus: Tensor) -> Tensor:
    """Algorithm 1 of arXiv 2306.01708 after the trim: elect the sign of the sum, average the entries that have it."""
    merged = []
    for entries in taus.T.tolist():
        elected = sum(entries)
        agreeing = [entry for entry in entries if entry * elected > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(merged, dtype=torch.float64)


def task_vectors(base: dict[str, Tensor], experts: dict[str, dict[str, Tensor]], names: Sequence[str]) -> Tensor:
    """float64 [T, n] of the float32 differences, over the tensors ``names`` laid end to end."""
    return torch.stack([torch.cat([(e[n] - base[n]).flatten() for n in names]).double() for e in experts.values()])


def test_ties_worked_by_hand() -> None:
    """Five parameters, three tasks, the top 60 % = 3 entries of each task vector are kept.

    a (4, -1, 3, 0.5, 2)   -> (4, 0, 3, 0, 2)
    b (-2, -3, 1, 5, 0.1)  -> (-2, -3, 0, 5, 0)
    c (1, 2, -6, -0.2, 3)  -> (0, 2, -6, 0, 3)
    signs of the sums (2, -1, -3, 5, 5): + - - + +; means of what agrees: 4, -3, -6, 5, (2 + 3) / 2.
    """
    taus = {"a": [4, -1, 3, 0.5, 2], "b": [-2, -3, 1, 5, 0.1], "c": [1, 2, -6, -0.2, 3]}
    base = {"w": torch.zeros(5)}
    experts = {task: {"w": torch.tensor(tau)} for task, tau in taus.items()}
    merged = merge_tensors("ties", base, experts, {"density": 0.6, "scope": "tensor"})
    assert merged["w"].tolist() == [4.0, -3.0, -6.0, 5.0, 2.5]
    halved = merge_tensors("ties", base, experts, {"density": 0.6, "scope": "tensor", "alpha": 0.5})
    assert halved["w"].tolist() == [2.0, -1.5, -3.0, 2.5, 1.25]


def test_ties_takes_the_top_over_the_whole_model_unless_told_otherwise() -> None:
    base = {"big": torch.zeros(4), "small": torch.zeros(4)}
    experts = {"a": {"big": torch.tensor([4.0, 5, 6, 7]), "small": torch.tensor([0.1, 0.2, 0.3, 0.4])}}
    everywhere = merge_tensors("ties", base, experts, {"density": 0.5})
    assert everywhere["big"].tolist() == [4.0, 5, 6, 7]
    assert everywhere["small"].tolist() == [0.0, 0, 0, 0]
    each = merge_tensors("ties", base, experts, {"density": 0.5, "scope": "tensor"})
    assert each["big"].tolist() == [0.0, 0, 6, 7]


def test_mass_that_cancels_exactly_elects_no_sign() -> None:
    experts = {"a": {"w": torch.tensor([3.0])}, "b": {"w": torch.tensor([-1.0])}}
    assert merge_tensors("ties", {"w": torch.ones(1)}, experts)["w"].tolist() == [1.0]


@pytest.mark.parametrize("tasks", [1, 2, 5])
@pytest.mark.parametrize("density", [0.001, 0.2, 0.9, 1.0])
def test_ties_equals_the_paper_in_float64(make_models: Callable[..., tuple], tasks: int, density: float) -> None:
    base, experts = make_models(tasks=tasks)
    each = merge_tensors("ties", base, experts, {"density": density, "scope": "tensor"})
    for name, weights in base.items():
        taus = reference_trim(task_vectors(base, experts, [name]), density)
        wanted = weights.flatten().double() + reference_elect_and_mean(taus)
        torch.testing.assert_close(each[name].flatten().double(), wanted, rtol=1e-6, atol=1e-6)
    everywhere = merge_tensors("ties", base, experts, {"density": density})
    taus = reference_trim(task_vectors(base, experts, list(base)), density)
    wanted = torch.cat([w.flatten() for w in base.values()]).double() + reference_elect_and_mean(taus)
    found = torch.cat([merged.flatten() for merged in everywhere.values()]).double()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_options_of_one_glob_form_a_population_of_their_own(make_models: Callable[..., tuple]) -> None:
    base, experts = make_models()
    merged = merge_tensors("ties", base, experts, {"density": 0.2}, overrides={"f*": {"density": 1}})
    alone = merge_tensors("ties", {n: w for n, w in base.items() if n != "fifty"}, experts, {"density": 0.2})
    for name, weights in alone.items():
        assert torch.equal(merged[name], weights)
    whole = merge_tensors("ties", {"fifty": base["fifty"]}, experts, {"density": 1})
    assert torch.equal(merged["fifty"], whole["fifty"])


def test_dare_keeps_or_drops_whole_entries_and_rescales() -> None:
    """A task vector of ones: every entry becomes 0 or 1 / density, and about a density's share survives."""
    n = 100_000
    base, experts = {"w": torch.zeros(n)}, {"a": {"w": torch.ones(n)}}
    merged = merge_tensors("dare", base, experts, {"density": 0.25, "alpha": 1})["w"]
    assert set(merged.unique().tolist()) == {0.0, 4.0}
    assert abs((merged != 0).float().mean().item() - 0.25) < 0.006  # four standard deviations


def test_dare_without_dropping_is_task_arithmetic(make_models: Callable[..., tuple]) -> None:
    base, experts = make_models()
    kept = merge_tensors("dare", base, experts, {"density": 1, "alpha": 0.3})
    plain = merge_tensors("task_arithmetic", base, experts, {"alpha": 0.3})
    assert all(torch.equal(kept[name], plain[name]) for name in base)


def test_dare_masks_follow_seed_task_and_tensor_and_nothing_else() -> None:
    ones = torch.ones(5000)
    zeros = {"w": 0 * ones, "v": 0 * ones}
    both = {"a": {"w": ones, "v": ones}, "b": {"w": -ones, "v": ones}}
    one = merge_tensors("dare", zeros, {"a": both["a"]}, {"density": 0.5, "alpha": 1})
    assert not torch.equal(one["w"], one["v"])
    again = merge_tensors("dare", {"w": 0 * ones}, {"a": {"w": ones}}, {"density": 0.5, "alpha": 1})
    assert torch.equal(again["w"], one["w"]), "a mask does not depend on which other tensors there are"
    pair = merge_tensors("dare", zeros, both, {"density": 0.5, "alpha": 1})["w"]
    assert set(pair.unique().tolist()) == {-2.0, 0.0, 2.0}, "two tasks have two masks"
    assert torch.equal(pair > 0, (one["w"] > 0) & (pair != 0)), "a task's mask does not depend on the other tasks"
    other = merge_tensors("dare", zeros, {"a": both["a"]}, {"density": 0.5, "alpha": 1}, seed=1)
    assert not torch.equal(other["w"], one["w"])


def test_dare_ties_is_the_election_over_what_dare_left(make_models: Callable[..., tuple]) -> None:
    base, experts = make_models(tasks=4)
    for name in base:
        zero, options = {name: 0 * base[name]}, {"alpha": 1, "density": 0.4}
        left = [
            merge_tensors("dare", zero, {task: {name: expert[name] - base[name]}}, options)
            for task, expert in experts.items()
        ]
        taus = torch.stack([tensors[name].flatten().double() for tensors in left])
        merged = merge_tensors("dare_ties", base, experts, {"density": 0.4})[name]
        wanted = base[name].flatten().double() + reference_elect_and_mean(taus)
        torch.testing.assert_close(merged.flatten().double(), wanted, rtol=1e-6, atol=1e-6)
