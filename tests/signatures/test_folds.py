"""Inputs judged by the others."""

from __future__ import annotations

import pytest
import torch

from retex_cli.signatures import folds


@pytest.mark.parametrize(("count", "others"), [(2, 1), (64, 63), (65, 60), (256, 240)])
def test_every_input_is_judged_once_and_never_by_itself(count: int, others: int) -> None:
    rows = torch.arange(count, dtype=torch.float64)[:, None]
    least: list[int] = []

    def judge(rest: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        assert not set(rest[:, 0].tolist()) & set(held[:, 0].tolist())
        assert len(rest) + len(held) == count
        least.append(len(rest))
        return held[:, 0] * 2

    assert torch.equal(folds.left_out(rows, judge), rows[:, 0] * 2)
    assert min(least) == others
