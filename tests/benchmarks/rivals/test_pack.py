"""Files of the rivals: what goes in comes out, and rare symbols cost little."""

from __future__ import annotations

import math

import pytest
import torch
from rivals.pack import Pack, Unpack


def test_everything_comes_back_in_order() -> None:
    pack = Pack()
    numbers = torch.randn(3, 4)
    levels = torch.randint(0, 17, (50, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.rand(1000, generator=torch.Generator().manual_seed(1)) < 0.1
    pack.symbols(levels)
    pack.halves(numbers)
    pack.singles(0.25, -3.5)
    pack.symbols(mask)
    pack.shorts([0, 65535])
    pack.symbols(torch.zeros(9))
    pack.symbols(torch.full((4,), 5))
    pack.symbols(torch.zeros(0))
    unpack = Unpack(pack.data())
    assert torch.equal(unpack.symbols(50, 7), levels.int())
    assert torch.equal(unpack.halves(3, 4), numbers.half().float())
    assert unpack.singles(2) == (0.25, -3.5)
    assert torch.equal(unpack.symbols(1000), mask.int())
    assert unpack.shorts(2) == [0, 65535]
    assert unpack.symbols(9).tolist() == [0] * 9
    assert unpack.symbols(4).tolist() == [5] * 4
    assert unpack.symbols(0).tolist() == []


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01, 0.001])
def test_a_mask_costs_its_entropy(share: float) -> None:
    count = 200_000
    pack = Pack()
    pack.symbols(torch.rand(count, generator=torch.Generator().manual_seed(0)) < share)
    entropy = -(share * math.log2(share) + (1 - share) * math.log2(1 - share))
    assert len(pack.data()) == pytest.approx(count * entropy / 8, rel=0.05, abs=24)


def test_a_number_beyond_half_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="float16"):
        Pack().halves(torch.tensor([1e6]))
