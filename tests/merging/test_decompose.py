"""Decompositions against torch's own in float64, and that the fast ones know when they fail."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from retex_cli.merging import decompose
from retex_cli.merging.decompose import add_gram, gram_matrix, leading, left_vectors, mirror, polar, spectrum, thin_svd


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def projector(vectors: Tensor) -> Tensor:
    return vectors @ vectors.T


@pytest.mark.parametrize("columns", [1, 192, 193, 400])
def test_strips_make_the_whole_gram_matrix(columns: int) -> None:
    parts = random(2, 50, columns)
    total = torch.zeros(columns, columns, dtype=torch.float64)
    for part in parts:
        add_gram(total, part)
    torch.testing.assert_close(mirror(total), sum(part.T @ part for part in parts))


@pytest.mark.parametrize("spectrum_of", ["flat", "decaying"])
@pytest.mark.parametrize("count", [1, 25, 150])
def test_leading_spans_what_float64_finds(spectrum_of: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = random(300, 200)
    if spectrum_of == "decaying":
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        matrix = u * (s[0] / torch.arange(1, 201)) @ v
    gram = gram_matrix(matrix)
    wanted, vectors = torch.linalg.eigh(gram)
    if not (spectrum_of == "decaying" and count == 150):
        monkeypatch.setattr(decompose, "spectrum", lambda *given: pytest.fail("float64 was not needed here"))
    values, found = leading(gram, count)
    torch.testing.assert_close(values.square(), wanted.flip(0)[:count], rtol=1e-10, atol=0)
    assert (projector(found) - projector(vectors.flip(1)[:, :count])).norm() < 1e-8


def test_leading_does_not_trust_float32_between_eigenvalues_that_it_cannot_tell_apart() -> None:
    basis = torch.linalg.qr(random(200, 200)).Q
    values = torch.linspace(2, 1, 200, dtype=torch.float64)
    values[20] = values[19] - 1e-9
    found = leading(basis * values @ basis.T, 20)[1]
    assert (projector(found) - projector(basis[:, :20])).norm() < 1e-5


def test_leading_leaves_out_what_has_no_singular_value() -> None:
    values, vectors = leading(gram_matrix(random(300, 8) @ random(8, 200, seed=1)), 25)
    assert values.shape == (8,)
    assert vectors.shape == (200, 8)
    assert leading(torch.zeros(200, 200, dtype=torch.float64), 3)[1].shape == (200, 0)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
def test_left_vectors_and_polar_factors(shape: tuple[int, int]) -> None:
    matrix = random(*shape)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert (projector(left_vectors(matrix, 7)) - projector(u[:, :7])).norm() < 1e-10
    tall, wanted = (matrix, u @ v) if shape[0] > shape[1] else (matrix.T, (u @ v).T)
    torch.testing.assert_close(polar(tall), wanted)


def test_a_thin_svd_is_that_of_the_product() -> None:
    left, right = random(40, 5), random(5, 30, seed=1)
    u, s, v = thin_svd(torch.cat([left, left], 1), torch.cat([right, right]))
    assert s.shape == (5,)
    torch.testing.assert_close(u * s @ v.T, 2 * left @ right)
    torch.testing.assert_close(s, spectrum(gram_matrix(2 * left @ right))[0])
