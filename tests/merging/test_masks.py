"""Random masks: the share that was asked for, no pattern, the same however the tensor is cut."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from retex_cli.merging.masks import draws, drop_, drop_each_, keys


def mask(density: float, n: int, tasks: tuple[str, ...] = ("a", "b"), seed: int = 0, start: int = 0) -> torch.Tensor:
    return drop_(torch.ones(len(tasks), n), [density] * len(tasks), keys(seed, "w", tasks), start)


def test_the_share_that_is_kept_is_the_density() -> None:
    for density in (0.01, 0.1, 0.5, 0.9):
        kept = mask(density, 1_000_000)
        assert (kept.mean(1) - density).abs().max() < 5 * (density * (1 - density) / 1e6) ** 0.5


def test_entries_neighbours_and_tasks_are_independent() -> None:
    kept = mask(0.5, 1_000_000)
    assert abs((kept[0] * kept[1]).mean() - 0.25) < 0.003
    for step in (1, 2, 64, 768, 4096):
        assert abs((kept[0, step:] * kept[0, :-step]).mean() - 0.25) < 0.003


def test_every_bit_of_a_draw_is_fair() -> None:
    drawn = draws(keys(3, "w", ("a",)), 0, 1 << 18)
    for bit in range(16):
        assert abs((drawn >> bit & 1).mean() - 0.5) < 0.005


def test_chances_of_their_own_are_met_one_by_one() -> None:
    chances = torch.tensor([0.02, 0.3, 0.9, 1.0]).repeat(250_000)[None]
    kept = drop_each_(torch.ones(1, 1_000_000), chances, keys(0, "w", ("a",)), 0).view(-1, 4).mean(0)
    assert torch.allclose(kept, chances[0, :4], atol=0.003)
    assert kept[3] == 1
    shared = drop_each_(torch.ones(2, 5000), torch.full((2, 5000), 0.4), keys(0, "w", ("a", "b")), 7)
    assert torch.equal(shared, mask(0.4, 5000, start=7)), "the same draws decide"


def test_a_mask_does_not_depend_on_where_a_block_begins() -> None:
    whole = mask(0.3, 10_000)
    for cut in (1, 4096, 9_999):
        assert torch.equal(torch.cat([mask(0.3, cut), mask(0.3, 10_000 - cut, start=cut)], 1), whole)
    top = (1 << 31) - 5  # beyond the reach of a 32-bit index
    assert torch.equal(mask(0.3, 100, start=top)[:, 50:], mask(0.3, 50, start=top + 50))
    assert not torch.equal(mask(0.3, 100, start=1 << 31), mask(0.3, 100))


def test_draws_are_the_stream_of_philox_that_recipes_promise() -> None:
    """A merge made again from its recipe has the same masks: the key, the order of the stream and its 16-bit parts."""
    digest = hashlib.sha256(b"5\0cars\0layer.0.weight").digest()
    stream = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(100)
    wanted = [int(word) >> shift & 0xFFFF for word in stream for shift in (0, 16, 32, 48)]
    key = keys(5, "layer.0.weight", ("cars", "dtd"))
    for start, length in ((0, 400), (3, 100), (16, 16), (33, 1)):
        assert draws(key, start, length)[0].tolist() == wanted[start : start + length]
    assert draws(key, 0, 4)[1].tolist() != wanted[:4]
