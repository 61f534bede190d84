"""Truncated SVD, LoRA extraction, TSV-Compress."""

from __future__ import annotations

import pytest
import torch
from rivals import low_rank

SHAPES = {"w": (60, 40), "conv": (24, 8, 3, 3), "bias": (40,)}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("shape", [(50, 20), (20, 50), (7, 7)])
def test_truncation_is_the_best_of_its_rank(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = low_rank.truncated(matrix, 3)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(left * values @ right, u[:, :3] * s[:3] @ vh[:3], atol=1e-4, rtol=1e-4)


def test_truncation_of_what_has_no_such_rank() -> None:
    matrix = torch.outer(torch.arange(5.0), torch.arange(4.0))
    left, values, right = low_rank.truncated(matrix, 3)
    assert values[1:].tolist() == [0, 0]
    torch.testing.assert_close(left * values @ right, matrix)
    left, values, right = low_rank.truncated(torch.zeros(5, 4), 2)
    assert not (left * values @ right).any()


def test_full_rank_is_exact() -> None:
    merged, expert = tensors(0), tensors(1)
    data = low_rank.encode(merged, expert, low_rank.fixed(1000), vectors=True)
    numel = sum(tensor.numel() for tensor in merged.values())
    assert len(data) == 8 + 2 * 3 + 2 * numel, "no larger than the offsets themselves"
    for name, tensor in low_rank.decode(merged, data).items():
        torch.testing.assert_close(tensor, expert[name], atol=3e-3, rtol=0)


def test_bytes_are_two_factors_in_half_precision() -> None:
    merged, expert = tensors(0), tensors(1)
    factors = 2 * (2 * (60 + 40) + 2 * (24 + 72))
    head = 8 + 2 * 3
    assert len(low_rank.encode(merged, expert, low_rank.fixed(2), vectors=False)) == head + factors
    assert len(low_rank.encode(merged, expert, low_rank.fixed(2), vectors=True)) == head + factors + 2 * 40


def test_extraction_leaves_vectors_as_they_are() -> None:
    merged, expert = tensors(0), tensors(1)
    found = low_rank.decode(merged, low_rank.encode(merged, expert, low_rank.fixed(2), vectors=False))
    assert torch.equal(found["bias"], merged["bias"])


def test_a_share_of_all_components() -> None:
    assert [low_rank.share(1 / 8)(m, n) for m, n in ((384, 1536), (40, 30), (3, 5))] == [48, 4, 1]
