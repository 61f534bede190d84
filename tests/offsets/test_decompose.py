"""Leading components: all of them from the Gram matrix, few from a Krylov space with a bound that holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from retex_cli.offsets.decompose import Components, decompose


def falling(shape: tuple[int, int], power: float) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    left = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=generator)).Q
    right = torch.linalg.qr(torch.randn(shape[1], min(shape), generator=generator)).Q
    return (left * torch.arange(1, min(shape) + 1).float() ** -power) @ right.T


def noise(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(8))


def energy(found: Components, rank: int) -> float:
    return float(found.values[:rank].double().square().sum())


def is_orthonormal(rows: Tensor) -> bool:
    return bool((rows @ rows.T - torch.eye(len(rows))).abs().max() < 1e-4)


@pytest.mark.parametrize("shape", [(20, 7), (7, 20), (5, 5), (1, 9), (9, 1)])
def test_all_components_are_the_singular_value_decomposition(shape: tuple[int, int]) -> None:
    matrix = noise(shape)
    found = decompose(matrix, 100)
    torch.testing.assert_close(found.values.double(), torch.linalg.svdvals(matrix.double()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((found.left * found.values) @ found.right, matrix, rtol=1e-4, atol=1e-5)
    assert found.missed == 0


@pytest.mark.parametrize("shape", [(300, 700), (700, 300), (300, 300)])
@pytest.mark.parametrize(("power", "share"), [(0.0, 0.9), (0.3, 0.99), (0.5, 0.999), (1.0, 0.9999)])
def test_few_components_hold_what_the_best_hold(shape: tuple[int, int], power: float, share: float) -> None:
    matrix = falling(shape, power) if power else noise(shape)
    found = decompose(matrix, 12)
    assert len(found.values) == 12
    assert is_orthonormal(found.left.T)
    assert is_orthonormal(found.right)
    assert bool((found.values.diff() <= 0).all())
    best = torch.linalg.svdvals(matrix.double()).square()
    for rank in (1, 5, 12):
        assert energy(found, rank) <= float(best[:rank].sum()) * (1 + 1e-5)
        assert energy(found, rank) >= share * float(best[:rank].sum())
        assert float(best[:rank].sum()) <= energy(found, rank) + found.missed, "the bound of the docstring"
    assert bool((best[:12] <= found.values.double().square() + found.missed).all())
    left = float((matrix - (found.left * found.values) @ found.right).double().square().sum())
    assert left == pytest.approx(float(best.sum()) - energy(found, 12), rel=1e-4)


def test_what_is_missed_is_what_the_gram_matrix_leaves_out() -> None:
    matrix = noise((40, 60))
    found = decompose(matrix, 12)
    assert len(found.values) == 24, "all are there, and twice as many come for nothing"
    assert found.missed == pytest.approx(float(matrix.double().square().sum()) - energy(found, 24), rel=1e-5)


@pytest.mark.parametrize("rank", [0, 3])
def test_zero_components_are_left_out(rank: int) -> None:
    generator = torch.Generator().manual_seed(9)
    matrix = torch.randn(400, rank, generator=generator) @ torch.randn(rank, 500, generator=generator)
    found = decompose(matrix, 10)
    assert len(found.values) == rank
    assert found.missed == 0, "there is nothing more to look for"
    torch.testing.assert_close((found.left * found.values) @ found.right, matrix, rtol=0, atol=1e-3)  # of about 2


def test_the_same_bits_each_time() -> None:
    matrix = noise((300, 700))
    first, second = decompose(matrix, 12), decompose(matrix.clone(), 12)
    assert torch.equal(first.left, second.left)
    assert torch.equal(first.right, second.right)


def test_no_entries_no_components() -> None:
    found = decompose(torch.zeros(0, 4), 5)
    assert found.left.shape == (0, 0)
    assert found.right.shape == (0, 4)
