from __future__ import annotations

import pytest
import torch

from retex_cli.errors import RetexError
from retex_cli.signatures.scatter import Scatter, scatter
from retex_cli.signatures.storage import StoredTask, load, orthonormal, store


def some_scatter() -> Scatter:
    return scatter(torch.randn(20, 90, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1)


def test_bytes_keep_each_vector_to_a_percent() -> None:
    found = some_scatter()
    stored = store(found, torch.zeros(20, 3), small=True)
    assert stored.basis.dtype == torch.int8
    errors = (stored.scatter().basis - found.basis).norm(dim=1)
    assert errors.max() < 0.015
    torch.testing.assert_close(stored.scatter().spectrum, found.spectrum, rtol=1e-6, atol=0)


def test_half_precision_is_orthonormal_again() -> None:
    found = some_scatter()
    again = store(found, torch.zeros(20, 3), small=False).scatter()
    torch.testing.assert_close(again.basis @ again.basis.T, torch.eye(19, dtype=torch.float64))
    assert (again.basis - found.basis).norm(dim=1).max() < 1e-3


def test_orthonormal_of_nothing() -> None:
    assert orthonormal(torch.zeros(0, 5)).shape == (0, 5)


def test_a_task_is_read_back_as_it_was_written() -> None:
    stored = store(some_scatter(), torch.rand(20, 3), small=True)
    tensors = {f"a/b/{name}": tensor for name, tensor in stored.tensors().items()}
    again = load("a/b", tensors, 90)
    assert all(torch.equal(tensor, stored.tensors()[name]) for name, tensor in again.tensors().items())
    assert again.count == 20
    assert again.nbytes == 19 * 90 + 4 * (90 + 19 + 19 + 1 + 60)


@pytest.mark.parametrize("name", ["mean", "basis", "scale", "spectrum", "residual", "calibration"])
def test_damage_is_named(name: str) -> None:
    stored: StoredTask = store(some_scatter(), torch.rand(20, 3), small=True)
    tensors = {f"cars/{field}": tensor for field, tensor in stored.tensors().items()}
    with pytest.raises(RetexError, match=f"no tensor 'cars/{name}'"):
        load("cars", {key: tensor for key, tensor in tensors.items() if key != f"cars/{name}"}, 90)
    with pytest.raises(RetexError, match="expected"):
        load("cars", {**tensors, f"cars/{name}": tensors[f"cars/{name}"].unsqueeze(0)}, 90)
