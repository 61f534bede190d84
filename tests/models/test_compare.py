"""Distances of answers: on the scale of each input, blind to what no probability depends on, never without a number."""

from __future__ import annotations

import math

import pytest
import torch

from retex_cli.models.compare import EQUAL, SAME, apart, diverged, thinned


def test_logits_count_up_to_what_all_classes_have_in_common() -> None:
    wanted = torch.tensor([[1.0, 3.0], [4.0, 0.0]])
    assert apart(wanted + torch.tensor([[7.0], [-2.0]]), wanted).tolist() == pytest.approx([SAME, SAME])
    assert apart(torch.zeros(2, 2), wanted).tolist() == pytest.approx([1.0, 1.0])


def test_images_count_by_their_own_contrast_and_with_their_brightness() -> None:
    wanted = torch.tensor([0.0, 1.0, 2.0, 3.0]).view(1, 1, 2, 2) * torch.tensor([1.0, 100.0]).view(2, 1, 1, 1)
    found = apart(wanted * 1.1, wanted)
    assert found[0] == pytest.approx(float(found[1]))
    assert apart(wanted + 1, wanted).tolist() == pytest.approx([4 / 5, 4 / 50_000])


def test_a_single_number_counts_by_the_variance_over_inputs() -> None:
    wanted = torch.tensor([[1.0], [3.0]])
    assert apart(wanted + torch.tensor([[1.0], [2.0]]), wanted).tolist() == pytest.approx([1.0, 4.0])


def test_what_is_no_number_is_as_far_as_can_be() -> None:
    found = apart(torch.tensor([[torch.nan, 0.0], [torch.inf, 0.0]]), torch.eye(2))
    assert found.tolist() == pytest.approx([1 / SAME, 1 / SAME])


def test_probabilities_diverge_by_what_is_likely_alone() -> None:
    wanted = torch.tensor([[9.0, -9.0, -20.0], [0.0, 0.0, -20.0]])
    unlikely = wanted + torch.tensor([0.0, 0.0, -6.0])
    assert diverged(unlikely, wanted).tolist() == pytest.approx([EQUAL, EQUAL])
    assert float(apart(unlikely, wanted).min()) > 0.05
    found = diverged(torch.zeros(2, 3), wanted)
    assert found.tolist() == pytest.approx([math.log(3), math.log(3 / 2)], rel=1e-3)
    assert diverged(torch.full((2, 3), torch.nan), wanted).tolist() == pytest.approx([1 / EQUAL, 1 / EQUAL])


def test_other_answers_diverge_as_they_are_apart() -> None:
    draw = torch.Generator().manual_seed(0)
    found, wanted = torch.randn(2, 4, 3, 5, 5, generator=draw)
    assert torch.equal(diverged(found, wanted), apart(found, wanted))
    assert torch.equal(
        diverged(found[:, 0, 0, :1], wanted[:, 0, 0, :1]), apart(found[:, 0, 0, :1], wanted[:, 0, 0, :1])
    )


def test_large_answers_are_thinned_and_as_far_apart_as_whole_ones() -> None:
    wanted, noise = torch.randn(2, 3, 5, 40_000, generator=torch.Generator().manual_seed(0))
    found = wanted + torch.tensor([0.01, 0.1, 1.0])[:, None, None] * noise
    few = thinned(wanted)
    assert few.shape == (3, 1, 50_000)
    assert few.is_contiguous()
    assert torch.allclose(apart(thinned(found), few), apart(found, wanted), rtol=0.05)
    assert torch.equal(thinned(wanted[:, 0]), wanted[:, 0])
