"""DARE, and the drop with 4 bits."""

from __future__ import annotations

import pytest
import torch
from rivals import drop

GENERATOR = torch.Generator().manual_seed(0)
MERGED = {"w": torch.zeros(400, 300), "bias": torch.zeros(16)}
EXPERT = {"w": torch.randn(400, 300, generator=GENERATOR), "bias": torch.randn(16, generator=GENERATOR)}


@pytest.mark.parametrize("seeded", [True, False])
def test_without_a_drop_the_expert_is_back(seeded: bool) -> None:
    found = drop.dare_decode(MERGED, drop.dare(MERGED, EXPERT, 0.0, seeded=seeded))
    for name, tensor in EXPERT.items():
        assert torch.equal(found[name], tensor.half().float())


def test_a_mask_drawn_again_is_the_mask_that_was_stored() -> None:
    small, large = (drop.dare(MERGED, EXPERT, 0.9, seeded=seeded) for seeded in (True, False))
    assert torch.equal(drop.dare_decode(MERGED, small)["w"], drop.dare_decode(MERGED, large)["w"])
    entropy = 400 * 300 * 0.469 / 8
    assert len(large) - len(small) == pytest.approx(entropy, rel=0.05)


def test_what_is_left_is_rescaled() -> None:
    found = drop.dare_decode(MERGED, drop.dare(MERGED, EXPERT, 0.75, seeded=True))["w"]
    kept = found != 0
    assert float(kept.float().mean()) == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(found[kept], 4 * EXPERT["w"][kept], atol=0, rtol=1e-3)


def test_four_bits_alone() -> None:
    found = drop.ultra_decode(MERGED, drop.ultra(MERGED, EXPERT, 0.0))["w"]
    low, high = EXPERT["w"].aminmax()
    assert float((found - EXPERT["w"]).abs().max()) <= float(high - low) / 30 + 1e-5
    assert len(found.unique()) <= 16


def test_of_every_level_the_same_share_is_dropped() -> None:
    whole = drop.ultra_decode(MERGED, drop.ultra(MERGED, EXPERT, 0.0))["w"]
    left = drop.ultra_decode(MERGED, drop.ultra(MERGED, EXPERT, 0.75))["w"] / 4
    for level in whole.unique():
        before, after = int((whole == level).sum()), int((left - level).abs().lt(1e-4).sum())
        assert after == pytest.approx(0.25 * before, abs=1)


def test_the_widest_matrices_lose_least() -> None:
    deltas = {str(k): (k + 1) * torch.randn(10, 10, generator=torch.Generator().manual_seed(k)) for k in range(6)}
    rates = drop.spread_drops(deltas, 0.9)
    assert [rates[str(k)] for k in range(6)] == pytest.approx([0.95, 0.95, 0.9, 0.9, 0.85, 0.85])
    one = drop.spread_drops({"w": torch.randn(4, 4)}, 0.9)
    assert one["w"] == pytest.approx(0.9)
