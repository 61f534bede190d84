from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from retex_cli.signatures import gaussian

SETTINGS = [(0.5, 0.0), (0.3, 0.25), (0.9, 1.0), (0.1, 0.5)]


def reference_scores(parts: list[np.ndarray], inputs: np.ndarray, weights: gaussian.Weights) -> np.ndarray:
    """The definition, with explicit D x D covariances, in float64."""
    size = parts[0].shape[1]
    scatters = [(part - part.mean(0)).T @ (part - part.mean(0)) for part in parts]
    columns = []
    for part, scatter, own in zip(parts, scatters, weights.own, strict=True):
        covariance = weights.ridge * np.eye(size) + weights.pooled * sum(scatters) + own * scatter
        away = inputs - part.mean(0)
        log_det = np.linalg.slogdet(covariance)[1] - size * math.log(weights.ridge)
        columns.append(np.einsum("md,de,me->m", away, np.linalg.inv(covariance), away) + log_det)
    return np.stack(columns, 1)


def reference_left_out(parts: list[np.ndarray], weights: gaussian.Weights) -> np.ndarray:
    """A refit for every input."""
    rows = []
    for task, part in enumerate(parts):
        for i in range(len(part)):
            rest = [np.delete(part, i, 0) if t == task else other for t, other in enumerate(parts)]
            rows.append(reference_scores(rest, part[i : i + 1], weights)[0])
    return np.stack(rows)


def some_parts(counts: tuple[int, ...], size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    stretch = torch.linspace(0.2, 3, size, dtype=torch.float64)
    return [
        torch.randn(count, size, generator=generator, dtype=torch.float64) * stretch.roll(t) + t
        for t, count in enumerate(counts)
    ]


def test_worked_example() -> None:
    """Inputs 0, 2 and 4, 8: means 1 and 6, sums of squares 2 and 8, mean variance 10 / 4."""
    parts = [torch.tensor([[0.0], [2.0]], dtype=torch.float64), torch.tensor([[4.0], [8.0]], dtype=torch.float64)]
    means, factors = gaussian.centre(parts)
    pooled = gaussian.weights([2, 2], 2.5, 0.5, 0.0)
    assert pooled == gaussian.Weights(1.25, 0.125, (0.0, 0.0))
    white = gaussian.whiten(means, factors, pooled)  # A = 1.25 + 0.125 * 10 = 2.5, log det A / ridge = log 2
    found = gaussian.distances(white, white.into(torch.tensor([[3.0]], dtype=torch.float64)))
    np.testing.assert_allclose(found, [[4 / 2.5 + math.log(2), 9 / 2.5 + math.log(2)]])
    mixed = gaussian.weights([2, 2], 2.5, 0.5, 0.5)
    white = gaussian.whiten(means, factors, mixed)  # 1.25 + 0.0625 * 10 + 0.125 * (2 | 8) = 2.125 | 2.875
    found = gaussian.distances(white, white.into(torch.tensor([[3.0]], dtype=torch.float64)))
    np.testing.assert_allclose(found, [[4 / 2.125 + math.log(1.7), 9 / 2.875 + math.log(2.3)]])


@pytest.mark.parametrize(("shrinkage", "own"), SETTINGS)
def test_scores_are_the_definition(shrinkage: float, own: float) -> None:
    parts = some_parts((9, 20, 5), 6)
    weights = gaussian.weights([9, 20, 5], 1.7, shrinkage, own)
    white = gaussian.whiten(*gaussian.centre(parts), weights)
    inputs = torch.cat(some_parts((4, 3), 6))
    expected = reference_scores([part.numpy() for part in parts], inputs.numpy(), weights)
    np.testing.assert_allclose(gaussian.distances(white, white.into(inputs)), expected, rtol=1e-9)


@pytest.mark.parametrize(("shrinkage", "own"), SETTINGS)
@pytest.mark.parametrize(("counts", "size"), [((9, 20, 5), 6), ((7, 2), 40), ((11,), 5)])
def test_leaving_out_equals_refitting(counts: tuple[int, ...], size: int, shrinkage: float, own: float) -> None:
    parts = some_parts(counts, size)
    weights = gaussian.weights(counts, 0.8, shrinkage, own)
    expected = reference_left_out([part.numpy() for part in parts], weights)
    np.testing.assert_allclose(gaussian.leave_each_out(parts, weights), expected, rtol=1e-8)
    kept_in = reference_scores([part.numpy() for part in parts], torch.cat(parts).numpy(), weights)
    assert np.abs(kept_in - expected).max() > 0.1


def test_compact_rows_give_the_same_left_out_scores_in_fewer_dimensions() -> None:
    parts = some_parts((8, 7), 60)
    small = gaussian.compact(parts)
    assert small[0].shape == (8, 15)
    weights = gaussian.weights([8, 7], 1.0, 0.5, 0.25)
    expected = gaussian.leave_each_out(parts, weights)
    torch.testing.assert_close(gaussian.leave_each_out(small, weights), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [torch.zeros(6, 30), torch.ones(6, 30), torch.eye(2).repeat(3, 15)])
def test_compact_takes_repeated_inputs(rows: torch.Tensor) -> None:
    small = gaussian.compact([rows.double(), rows.double()])
    assert all(part.isfinite().all() for part in small)
    torch.testing.assert_close(torch.cdist(small[0], small[1]), torch.cdist(rows, rows).double(), atol=1e-4, rtol=0)


def test_a_given_gram_matrix_changes_nothing() -> None:
    parts = some_parts((9, 5), 4)
    weights = gaussian.weights([9, 5], 1.0, 0.5, 0.25)
    factors = torch.cat(gaussian.centre(parts)[1])
    expected = gaussian.leave_each_out(parts, weights)
    assert torch.equal(gaussian.leave_each_out(parts, weights, factors.T @ factors), expected)
