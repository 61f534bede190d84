"""average and task_arithmetic against their formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from retex_cli.errors import UsageError
from retex_cli.merging.memory import merge_tensors


def test_average_worked_by_hand() -> None:
    base = {"w": torch.tensor([9.0, 9.0])}
    experts = {"a": {"w": torch.tensor([1.0, -2.0])}, "b": {"w": torch.tensor([3.0, 5.0])}}
    assert merge_tensors("average", base, experts)["w"].tolist() == [2.0, 1.5]


def test_the_average_of_equal_experts_is_that_expert_to_the_bit() -> None:
    expert = {"w": torch.randn(1000, generator=torch.Generator().manual_seed(1))}
    merged = merge_tensors("average", {"w": torch.zeros(1000)}, {"a": expert, "b": expert})
    assert torch.equal(merged["w"], expert["w"])


def test_task_arithmetic_worked_by_hand() -> None:
    base = {"w": torch.tensor([1.0, 2.0])}
    experts = {"a": {"w": torch.tensor([2.0, 2.0])}, "b": {"w": torch.tensor([1.0, 6.0])}}
    # task vectors (1, 0) and (0, 4); half of their sum is (0.5, 2)
    assert merge_tensors("task_arithmetic", base, experts, {"alpha": 0.5})["w"].tolist() == [1.5, 4.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_both_equal_their_formula_in_float64(make_models: Callable[..., tuple], dtype: torch.dtype) -> None:
    base, experts = make_models(tasks=5, dtype=dtype)
    average = merge_tensors("average", base, experts)
    arithmetic = merge_tensors("task_arithmetic", base, experts, {"alpha": 0.3})
    step = 2 * torch.finfo(dtype).eps
    for name, weights in base.items():
        stack = torch.stack([expert[name].double() for expert in experts.values()])
        torch.testing.assert_close(average[name].double(), stack.mean(0), rtol=step, atol=step / 10)
        wanted = weights.double() + 0.3 * (stack - weights.double()).sum(0)
        torch.testing.assert_close(arithmetic[name].double(), wanted, rtol=step, atol=step)
        assert average[name].dtype == dtype


def test_slerp_worked_by_hand() -> None:
    """Unit vectors at a right angle meet at 45 degrees; at a third of the way the angle is 30 degrees."""
    experts = {"a": {"w": torch.tensor([1.0, 0.0])}, "b": {"w": torch.tensor([0.0, 1.0])}}
    half = merge_tensors("slerp", {"w": torch.zeros(2)}, experts)["w"]
    torch.testing.assert_close(half, torch.full((2,), 0.5**0.5))
    third = merge_tensors("slerp", {"w": torch.zeros(2)}, experts, {"t": 1 / 3})["w"]
    torch.testing.assert_close(third, torch.tensor([3**0.5 / 2, 0.5]))


def test_slerp_between_parallel_vectors_is_linear() -> None:
    experts = {"a": {"w": torch.tensor([1.0, 2.0])}, "b": {"w": torch.tensor([3.0, 6.0])}}
    assert merge_tensors("slerp", {"w": torch.zeros(2)}, experts, {"t": 0.25})["w"].tolist() == [1.5, 3.0]


def test_slerp_equals_its_formula_in_float64(make_models: Callable[..., tuple]) -> None:
    base, experts = make_models(tasks=2)
    experts = {task: {n: w + torch.randn(w.shape) for n, w in expert.items()} for task, expert in experts.items()}
    merged = merge_tensors("slerp", base, experts, {"t": 0.3})
    for name in ("matrix", "conv", "long", "fifty"):
        a, b = (expert[name].double() for expert in experts.values())
        angle = torch.acos((a * b).sum() / a.norm() / b.norm())
        wanted = (torch.sin(0.7 * angle) * a + torch.sin(0.3 * angle) * b) / torch.sin(angle)
        torch.testing.assert_close(merged[name].double(), wanted, rtol=1e-6, atol=1e-6)


def test_model_stock_worked_by_hand() -> None:
    """Task vectors (2, 0) and (1, 1), 45 degrees apart: t = 2 c / (1 + c), c = 1 / sqrt 2; their mean is (1.5, 0.5)."""
    base = {"w": torch.tensor([1.0, 1.0])}
    experts = {"a": {"w": torch.tensor([3.0, 1.0])}, "b": {"w": torch.tensor([2.0, 2.0])}}
    t = 2 * 0.5**0.5 / (1 + 0.5**0.5)
    merged = merge_tensors("model_stock", base, experts)["w"]
    torch.testing.assert_close(merged, torch.tensor([1 + 1.5 * t, 1 + 0.5 * t]))


def test_model_stock_equals_its_formula_in_float64(make_models: Callable[..., tuple]) -> None:
    base, experts = make_models(tasks=4)
    shared = {name: 0.1 * torch.randn(w.shape) for name, w in base.items()}
    experts = {task: {n: w + shared[n] for n, w in expert.items()} for task, expert in experts.items()}
    merged = merge_tensors("model_stock", base, experts)
    for name in ("matrix", "conv", "long", "fifty"):
        taus = [expert[name].double() - base[name].double() for expert in experts.values()]
        pairs = [(a * b).sum() / a.norm() / b.norm() for i, a in enumerate(taus) for b in taus[i + 1 :]]
        cosine = sum(pairs) / len(pairs)
        t = 4 * cosine / (1 + 3 * cosine)
        wanted = t * (base[name].double() + sum(taus) / 4) + (1 - t) * base[name].double()
        torch.testing.assert_close(merged[name].double(), wanted, rtol=1e-6, atol=1e-6)


def test_model_stock_refuses_one_expert(make_models: Callable[..., tuple]) -> None:
    base, experts = make_models(tasks=1)
    with pytest.raises(UsageError, match="needs two experts or more with tensor 'matrix'"):
        merge_tensors("model_stock", base, experts)
