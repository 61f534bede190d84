"""Predictions without a last bit in doubt: any order of summation gives the same, and it is the offset."""

from __future__ import annotations

import torch

from retex_cli.offsets.fixed import Prediction, prediction
from retex_cli.offsets.stream import Factors


def factors(rows: int, columns: int, rank: int) -> Factors:
    generator = torch.Generator().manual_seed(rank)
    scales = torch.logspace(0, -3, rank)
    return Factors(
        torch.randn(rows, rank, generator=generator) * scales, torch.randn(rank, columns, generator=generator)
    )


def test_the_offset_is_that_of_the_predictor_to_seven_digits() -> None:
    pair, merged = factors(40, 30, 20), torch.randn(40, 30)
    exact = pair.left.double() @ pair.right.double()
    found = Prediction(merged, pair, torch.float64).offset(0, 40) - merged.double()
    assert (found - exact).abs().max() < 1e-5 * exact.abs().max()


def test_the_order_of_components_and_the_cut_into_rows_change_no_bit() -> None:
    pair, merged = factors(64, 48, 33), torch.randn(64, 48)
    whole = Prediction(merged, pair, torch.float64).offset(0, 64)
    order = torch.randperm(33)
    shuffled = Factors(pair.left[:, order], pair.right[order])
    assert torch.equal(Prediction(merged, shuffled, torch.float64).offset(0, 64), whole)
    rows = [Prediction(merged, pair, torch.float64).offset(i, i + 1) for i in range(64)]
    assert torch.equal(torch.cat(rows), whole)
    floating = torch.cat([pair.left.double()[i : i + 1] @ pair.right.double() for i in range(64)])
    sums = (pair.left.double()[:, order] @ pair.right.double()[order], floating)
    assert not torch.equal(*sums)  # which is why


def test_every_partial_sum_is_an_exact_integer() -> None:
    huge = Factors(torch.full((3, 500), 7.3), torch.full((500, 4), -9.1))
    left, right, unit = Prediction(torch.zeros(3, 4), huge, torch.float32)._factors
    assert torch.equal(left, left.round())
    assert torch.equal(right, right.round())
    assert float((left.abs() @ right.abs()).max()) <= 2.0**53
    assert torch.allclose((left @ right) * unit, torch.full((3, 4), -7.3 * 9.1 * 500).double(), rtol=1e-5)


def test_it_is_rounded_to_the_experts_type() -> None:
    merged = torch.tensor([1.0, 2.0])
    vector = Factors(torch.tensor([[0.001], [0.002]]), None)
    found = Prediction(merged, vector, torch.bfloat16).offset(0, 1)
    assert found.dtype == torch.bfloat16
    assert found.tolist() == [[1.0, 2.0]]
    assert (
        Prediction(merged, vector, torch.float32).offset(0, 1).tolist() == (merged + vector.left[:, 0])[None].tolist()
    )


def test_variances_are_predicted_by_the_merged_ones() -> None:
    merged = torch.tensor([1.0, 2.0])
    vector = Factors(torch.tensor([[0.1], [0.2]]), None)
    assert not prediction("bn.running_var", merged, vector, torch.float32).has_offset
    assert prediction("bn.running_mean", merged, vector, torch.float32).has_offset
