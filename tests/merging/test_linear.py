"""average and task_arithmetic against their formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

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
