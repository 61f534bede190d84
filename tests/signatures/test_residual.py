from __future__ import annotations

import numpy as np
import pytest
import torch

from retex_cli.signatures import residual


def reference_subspace(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By the singular value decomposition, as published."""
    mean = rows.mean(0)
    right = np.linalg.svd(rows - mean, full_matrices=False)[2]
    return mean, right[: min(max(1, round(0.1 * rows.shape[1])), len(rows) - 1)]


def reference_norm(inputs: np.ndarray, mean: np.ndarray, right: np.ndarray) -> np.ndarray:
    away = inputs - mean
    return np.linalg.norm(away - away @ right.T @ right, axis=1)


def test_worked_example() -> None:
    """Three inputs along the first axis about (2, 1): an input at (5, 4) is 3 away from that line."""
    rows = torch.tensor([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]], dtype=torch.float64)
    mean, basis = residual.subspace(rows)
    found = residual.distances(torch.tensor([[5.0, 4.0]], dtype=torch.float64), mean[None], [basis])
    assert found.item() == pytest.approx(3.0)


@pytest.mark.parametrize(("size", "count", "rank"), [(384, 128, 38), (384, 32, 31), (4, 10, 1), (15, 9, 2), (8, 2, 1)])
def test_rank(size: int, count: int, rank: int) -> None:
    assert residual.rank_of(size, count) == rank


def test_distances_are_the_reference() -> None:
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(n, 30, generator=generator, dtype=torch.float64) + t for t, n in enumerate((12, 3, 40))]
    inputs = torch.randn(20, 30, generator=generator, dtype=torch.float64)
    found = [residual.subspace(part) for part in parts]
    scores = residual.distances(inputs, torch.stack([m for m, _ in found]), [b for _, b in found])
    expected = [reference_norm(inputs.numpy(), *reference_subspace(part.numpy())) for part in parts]
    np.testing.assert_allclose(scores, np.stack(expected, 1), rtol=1e-9)


def test_up_to_64_inputs_are_left_out_one_by_one() -> None:
    rows = torch.randn(10, 25, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = [
        reference_norm(rows.numpy()[i : i + 1], *reference_subspace(np.delete(rows.numpy(), i, 0)))[0]
        for i in range(10)
    ]
    np.testing.assert_allclose(residual.left_out(rows), expected, rtol=1e-9)


def test_more_are_left_out_in_folds_that_do_not_hold_them() -> None:
    rows = torch.randn(80, 25, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    fold = np.arange(80) % 16 == 5
    expected = reference_norm(rows.numpy()[fold], *reference_subspace(rows.numpy()[~fold]))
    np.testing.assert_allclose(residual.left_out(rows)[fold], expected, rtol=1e-9)


def test_two_inputs_leave_a_single_point() -> None:
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    np.testing.assert_allclose(residual.left_out(rows), [5.0, 5.0])


def test_only_the_own_task_lacks_the_input() -> None:
    generator = torch.Generator().manual_seed(4)
    parts = [torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(2)]
    scores = residual.leave_each_out(parts)
    torch.testing.assert_close(scores[6:, 1], residual.left_out(parts[1]))
    mean, basis = residual.subspace(parts[0])
    torch.testing.assert_close(scores[6:, :1], residual.distances(parts[1], mean[None], [basis]))
