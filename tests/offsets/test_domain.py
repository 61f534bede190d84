"""Variances are subtracted as logarithms: there and back, positive whatever the offset."""

from __future__ import annotations

import pytest
import torch

from retex_cli.offsets.domain import EPSILON, from_domain, to_domain


def test_weights_are_taken_as_they_are() -> None:
    weight = torch.tensor([-1.0, 0.0, 3.0], dtype=torch.bfloat16)
    assert torch.equal(to_domain("bn.running_mean", weight), weight.float())
    assert torch.equal(from_domain("bn.weight", weight.float()), weight.float())


def test_a_variance_comes_back_and_its_offset_is_a_factor() -> None:
    variance = torch.tensor([1e-3, 1.0, 4e4])
    there = to_domain("bn.running_var", variance)
    torch.testing.assert_close(from_domain("bn.running_var", there), variance)
    doubled = from_domain("bn.running_var", there + torch.tensor(2.0).log() / 2)
    torch.testing.assert_close(doubled, 2 * variance + EPSILON, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offset", [-100.0, -1.0, 1.0])
def test_a_variance_is_never_negative_or_nan(offset: float) -> None:
    variance = torch.tensor([0.0, 1e-9, 5.0, -1e-8])
    found = from_domain("bn.running_var", to_domain("bn.running_var", variance) + offset)
    assert bool((found >= 0).all())
    assert bool(found.isfinite().all())
