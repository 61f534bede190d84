"""Random masks: the share that was asked for, no pattern, the same however the tensor is cut."""

from __future__ import annotations

import hashlib

import torch

from retex_cli.merging.masks import drop_, hashed, keys


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


def test_every_bit_of_the_hash_is_fair() -> None:
    bits = hashed(keys(3, "w", ("a",)), 0, 1 << 18)
    assert bits.min() >= 0
    for bit in range(31):
        assert abs((bits >> bit & 1).float().mean() - 0.5) < 0.005


def test_a_mask_does_not_depend_on_where_a_block_begins() -> None:
    whole = mask(0.3, 10_000)
    for cut in (1, 4096, 9_999):
        assert torch.equal(torch.cat([mask(0.3, cut), mask(0.3, 10_000 - cut, start=cut)], 1), whole)
    top = (1 << 31) - 5  # beyond the reach of a 32-bit index
    assert torch.equal(mask(0.3, 100, start=top)[:, 50:], mask(0.3, 50, start=top + 50))
    assert not torch.equal(mask(0.3, 100, start=1 << 31), mask(0.3, 100))


def by_hand(seed: int, name: str, task: str, index: int) -> int:
    """The hash in plain integers, as a file's recipe promises it."""

    def signed(x: int) -> int:
        return (x + 2**31) % 2**32 - 2**31

    key = int.from_bytes(hashlib.sha256(f"{seed}\0{task}\0{name}".encode()).digest()[:4], "little") % 2**31
    x = (index ^ (index >> 31) * 0x1E3779B1) % 2**31 ^ key
    x = signed((x ^ x >> 16) * 0x7FEB352D)
    return (x ^ x >> 15) * 0x846CA68B % 2**31


def test_the_hash_is_the_one_that_files_were_made_with() -> None:
    for start in (0, 4096, (3 << 31) + 17, (1 << 31) - 20):
        bits = hashed(keys(5, "layer.0.weight", ("cars", "dtd")), start, 50)
        wanted = [[by_hand(5, "layer.0.weight", task, start + i) for i in range(50)] for task in ("cars", "dtd")]
        assert bits.tolist() == wanted
    assert [by_hand(0, "w", "a", i) for i in range(2)] == [407351897, 1821221948]
