"""Options that differ between tasks, and the switches with which released code is reproduced: worked by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from retex_cli.errors import UsageError
from retex_cli.merging.memory import merge_tensors
from retex_cli.merging.options import PerTask, each, plain
from retex_cli.merging.table import METHODS

ZERO = {"w": torch.zeros(4)}
A = torch.tensor([4.0, -1.0, 2.0, 0.0])
B = torch.tensor([-2.0, 3.0, 2.0, 1.0])


def merged(method: str, **options: object) -> list[float]:
    found = merge_tensors(method, ZERO, {"a": {"w": A}, "b": {"w": B}}, options)["w"]
    return [round(value, 5) for value in found.tolist()]


def test_a_mapping_names_tasks_and_leaves_the_others_to_the_default_or_to_a_star() -> None:
    resolved = METHODS["ties"].resolve({"weight": {"a": "0.5"}, "density": {"*": 0.3, "b": 0.4}})
    assert each(resolved["weight"], ("b", "a")) == (1.0, 0.5)  # type: ignore[arg-type]
    assert each(resolved["density"], ("a", "b", "c")) == (0.3, 0.4, 0.3)  # type: ignore[arg-type]
    assert plain(resolved, ("a", "b"))["density"] == {"a": 0.3, "b": 0.4}
    assert plain(resolved, ("a", "b"))["alpha"] == 1.0
    assert METHODS["ties"].resolve(resolved) == resolved
    assert PerTask((("a", 2.0),), 1.0).of("z") == 1.0


@pytest.mark.parametrize(
    ("method", "option", "value", "words"),
    [
        ("ties", "density", {"a": 1.5}, "for 'a' is 1.5"),
        ("ties", "weight", {"a": "much"}, "for 'a' is 'much'"),
        ("ties", "alpha", {"a": 1}, "must be a number|is {'a': 1}"),
        ("iso_c", "weight", {"a": 1}, "no option 'weight'"),
    ],
)
def test_a_mapping_that_cannot_be_meant_is_refused(method: str, option: str, value: object, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        METHODS[method].resolve({option: value})


@pytest.mark.parametrize("overridden", [False, True])
def test_a_task_that_is_not_merged_is_refused_with_the_closest(overridden: bool) -> None:
    experts = {"cars": {"w": A}, "dogs": {"w": B}}
    options = {"weight": {"car": 2}}
    with pytest.raises(UsageError, match="names the task 'car'") as caught:
        merge_tensors(
            "ties", ZERO, experts, {} if overridden else options, overrides={"*": options} if overridden else {}
        )
    assert "cars" in str(caught.value.hint)


def test_weights_of_the_average() -> None:
    assert merged("average", weight={"a": 3}) == [2.5, 0.0, 2.0, 0.25]
    assert merged("average", weight={"a": 3}, normalise=False) == [10.0, 0.0, 8.0, 1.0]
    with pytest.raises(UsageError, match="add up to 0"):
        merged("average", weight={"a": -1})


def test_weights_of_task_arithmetic() -> None:
    assert merged("task_arithmetic", alpha=1, weight={"a": 2, "b": 0.5}) == [7.0, -0.5, 5.0, 0.5]
    assert merged("task_arithmetic", alpha=1, weight={"a": 2, "b": 0.5}, normalise=True) == [2.8, -0.2, 2.0, 0.2]
    assert merged("task_arithmetic", alpha=1, weight={"a": -1}, normalise=True) == merged(
        "task_arithmetic", alpha=1, weight={"a": -1}
    ), "weights that cancel are not divided by"


def test_weights_take_part_in_the_election_of_ties_and_in_its_mean() -> None:
    """Weighted by 1 and 3: sums 4 - 6, -1 + 9, 2 + 6, 3; what agrees over its weights: -6/3, 9/3, 8/4, 3/3."""
    assert merged("ties", density=1, weight={"b": 3}) == [-2.0, 3.0, 2.0, 1.0]
    assert merged("ties", density=1, weight={"b": 3}, normalise=False) == [-6.0, 9.0, 8.0, 3.0]
    assert merged("ties", density=1, weight={"b": 0}) == [4.0, -1.0, 2.0, 0.0], "a weight of 0 has no voice"
    # flipped by -1, b's entries are 2, -3, -2, -1; weights that cancel are not divided by, -1 alone is
    assert merged("ties", density=1, weight={"b": -1}) == [6.0, -4.0, 0.0, 1.0]


def test_a_cancelled_sum_is_nothing_or_positive() -> None:
    assert merged("ties", density=1, weight={"b": 2}) == [0.0, 3.0, 2.0, 1.0]
    assert merged("ties", density=1, weight={"b": 2}, cancelled="plus") == [4.0, 3.0, 2.0, 1.0]
    assert merged("dare_ties", density=1, weight={"b": 2}, cancelled="plus", normalise=False) == [4.0, 6.0, 6.0, 2.0]


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_densities_per_task(scope: str) -> None:
    """a keeps 4 alone, b everything: sums 2, 3, 2, 1."""
    assert merged("ties", density={"a": 0.25, "b": 1}, scope=scope) == [4.0, 3.0, 2.0, 1.0]
    assert merged("breadcrumbs", density={"a": 0.25, "b": 1}, gamma=0, alpha=1) == [2.0, 3.0, 2.0, 1.0]


def test_outliers_per_task_and_election_of_breadcrumbs() -> None:
    """Without its largest, a keeps 2 and -1; b keeps 3 and the two entries of magnitude 2."""
    options = {"density": 0.5, "gamma": {"a": 0.25, "b": 0}, "alpha": 1}
    assert merged("breadcrumbs", **options) == [-2.0, 2.0, 4.0, 0.0]
    assert merged("breadcrumbs", **options, elect=True, normalise=True) == [-2.0, 3.0, 2.0, 0.0]


def test_random_drops_take_a_density_per_task(make_models: Callable[..., tuple]) -> None:
    base, experts = make_models(tasks=2)
    plus = {"density": {"task0": 1, "task1": 0.5}, "alpha": 1}
    both = merge_tensors("dare", base, experts, plus)["long"]
    kept = merge_tensors("dare", base, {"task0": experts["task0"]}, {"density": 1, "alpha": 1})["long"]
    dropped = merge_tensors("dare", base, {"task1": experts["task1"]}, {"density": 0.5, "alpha": 1})["long"]
    torch.testing.assert_close(both, kept + dropped - base["long"])


@pytest.mark.parametrize(("method", "extra"), [("dare", {}), ("della", {"window": 0.3, "elect": False})])
def test_rescaling_to_the_norm_before_keeps_the_norm(
    method: str, extra: dict[str, object], make_models: Callable[..., tuple]
) -> None:
    base, experts = make_models(tasks=1)
    options = {"density": 0.4, "alpha": 1, **extra}
    tau = (experts["task0"]["matrix"] - base["matrix"]).double()
    off, kept = (
        merge_tensors(method, base, experts, {**options, "rescale": how})["matrix"].double() - base["matrix"].double()
        for how in ("off", "l1")
    )
    assert kept.abs().sum().item() == pytest.approx(tau.abs().sum().item(), rel=1e-4)
    assert 0.3 < (off.abs() > 1e-6).double().mean().item() < 0.5
    torch.testing.assert_close(off[off.abs() > 1e-6], tau[off.abs() > 1e-6], rtol=1e-4, atol=1e-6)


def test_sce_takes_its_share_of_what_differs_and_floors_small_energies() -> None:
    """Variances 9, 4, 0, 1/4: half of the three that differ is one, half of all four is two."""
    assert merged("sce", density=0.5, of="differing") == [4.0, 0.0, 0.0, 0.0]
    assert merged("sce", density=0.5) == [4.0, 3.0, 0.0, 0.0]
    # energies 21 and 18: a weighs 21/39 and b 18/39; the third entries agree
    assert merged("sce", density=1) == [4.0, 3.0, 2.0, 1.0]
    tilted = {"a": {"w": torch.tensor([3.0, 4.0, 0.0, 0.0])}, "b": {"w": torch.tensor([1.0, 2.0, 0.0, 0.0])}}
    weighed = merge_tensors("sce", ZERO, tilted, {"density": 1})["w"]
    assert weighed[:2].tolist() == pytest.approx([(75 + 5) / 30, (100 + 10) / 30])
    equal = merge_tensors("sce", ZERO, tilted, {"density": 1, "floor": 100})["w"]
    assert equal[:2].tolist() == [2.0, 3.0]


def test_model_stock_takes_small_norms_for_the_floor() -> None:
    """Norms 3e-4 and 4e-4, cosine 1: with a floor of 1e-6 the cosine is 0.12 and t = 0.24 / 1.12."""
    experts = {"a": {"w": torch.tensor([3e-4, 0, 0, 0])}, "b": {"w": torch.tensor([4e-4, 0, 0, 0])}}
    exact = merge_tensors("model_stock", ZERO, experts)["w"]
    assert exact[0].item() == pytest.approx(3.5e-4)
    floored = merge_tensors("model_stock", ZERO, experts, {"floor": 1e-6})["w"]
    assert floored[0].item() == pytest.approx(3.5e-4 * 0.24 / 1.12)
