from __future__ import annotations

import torch

from retex_cli.signatures.scatter import pooled_variance, scatter


def covariance(rows: torch.Tensor) -> torch.Tensor:
    centred = rows - rows.mean(0)
    return centred.T @ centred / len(rows)


def test_all_directions_give_the_covariance() -> None:
    for shape in ((9, 20), (50, 6)):
        rows = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 5
        part = scatter(rows)
        assert len(part.basis) == min(shape[0] - 1, shape[1])
        torch.testing.assert_close(part.factor.T @ part.factor, covariance(rows))
        torch.testing.assert_close(part.basis @ part.basis.T, torch.eye(len(part.basis), dtype=torch.float64))
        assert part.residual == 0.0


def test_what_is_cut_off_is_spread_over_the_rest() -> None:
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    part = scatter(rows, 2)
    values = torch.linalg.eigvalsh(covariance(rows)).flip(0)
    torch.testing.assert_close(part.spectrum, values[:2])
    torch.testing.assert_close(torch.tensor(part.residual).double(), values[2:].mean())
    torch.testing.assert_close(torch.tensor(part.total).double(), values.sum())


def test_leading_directions_are_those_of_a_smaller_scatter() -> None:
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, wanted = scatter(rows, 4).leading(2), scatter(rows, 2)
    assert (len(found.basis), found.count) == (2, 50)
    torch.testing.assert_close(found.factor.T @ found.factor, wanted.factor.T @ wanted.factor)
    assert abs(found.residual - wanted.residual) < 1e-12
    assert scatter(rows, 2).leading(2).basis.shape == (2, 6)


def test_repeated_inputs_have_no_directions() -> None:
    rows = torch.full((8, 5), 0.3, dtype=torch.float64)
    assert len(scatter(rows).basis) == 0
    two = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 2.0]], dtype=torch.float64).repeat(4, 1)
    assert len(scatter(two).basis) == 1


def test_pooled_variance_counts_inputs_and_never_is_zero() -> None:
    wide, still = torch.tensor([[0.0, 2.0], [0.0, -2.0]]).double(), torch.ones(6, 2).double()
    assert pooled_variance([scatter(wide), scatter(still)]) == 8 / (8 * 2)
    assert 0 < pooled_variance([scatter(still)]) < 1e-5
