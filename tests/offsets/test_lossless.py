"""Exact corrections: every bit comes back, they are as short as the noise allows, and damage is noticed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retex_cli.io.provenance import tensor_digest
from retex_cli.offsets import lossless
from retex_cli.offsets.coder import CorruptOffsets
from retex_cli.offsets.fixed import Prediction
from retex_cli.offsets.lossless import Correction, OtherPrediction
from retex_cli.offsets.stream import Factors

WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(WORDS[tensor.dtype.itemsize])


def restored(data: bytes, prediction: Prediction, dtype: torch.dtype) -> Tensor:
    """All blocks of a correction, checked as a whole."""
    correction = Correction(lambda start, stop: data[start:stop], len(data), *prediction.shape, dtype)
    found = [correction.restore(k, prediction) for k in range(len(correction.blocks))]
    whole = torch.cat([torch.empty(0, prediction.shape[1], dtype=dtype), *found])
    correction.check(tensor_digest(whole))
    return whole


def there_and_back(expert: Tensor, prediction: Prediction) -> float:
    """Bits an entry; fails unless every bit comes back."""
    data = lossless.encode(expert, prediction)
    back = restored(data, prediction, expert.dtype)
    assert back.dtype == expert.dtype
    assert torch.equal(bits(back), bits(expert))
    return 8 * len(data) / max(1, expert.numel())


@pytest.mark.parametrize("dtype", [*lossless.TYPES], ids=str)
@pytest.mark.parametrize("shape", [(60, 50), (77,), (), (0, 5), (5, 0), (5, 3, 3, 3)], ids=str)
def test_every_type_and_shape_comes_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    merged = 0.05 * noise(*shape)
    there_and_back((merged + 1e-3 * noise(*shape, seed=1)).to(dtype), Prediction(merged, None, dtype))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_two_tensors(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 7))
    numbers = st.lists(st.floats(-1e4, 1e4, width=32), min_size=rows * columns, max_size=rows * columns)
    expert, merged = (torch.tensor(data.draw(numbers)).reshape(rows, columns) for _ in range(2))
    there_and_back(expert.to(dtype), Prediction(merged, None, dtype))


@pytest.mark.parametrize(("dtype", "mantissa"), [(torch.float32, 23), (torch.bfloat16, 7)], ids=str)
def test_it_is_as_short_as_normal_noise_allows(dtype: torch.dtype, mantissa: int) -> None:
    """The entropy of the error, less that of what lies between two neighbouring values."""
    merged, error = 0.05 * noise(400, 500), 2e-3
    expert = (merged + error * noise(400, 500, seed=1)).to(dtype)
    exponents = torch.frexp(expert.float())[1].double() - 1
    entropy = math.log2(error * math.sqrt(2 * math.pi * math.e)) - float((exponents - mantissa).mean())
    assert there_and_back(expert, Prediction(merged, None, dtype)) < entropy + (
        0.2 if dtype == torch.bfloat16 else 0.12
    )


def test_rows_that_equal_the_merged_ones_cost_nothing() -> None:
    merged = noise(1000, 64)
    expert = merged.clone()
    expert[::10] += 1e-3 * noise(100, 64, seed=1)
    alone = there_and_back(expert[::10].clone(), Prediction(merged[::10], None, torch.float32))
    assert there_and_back(expert, Prediction(merged, None, torch.float32)) < alone / 10 + 0.1


def test_single_entries_that_hit_cost_little() -> None:
    merged = noise(300, 300)
    moved = noise(300, 300, seed=2) > 1.5
    expert = torch.where(moved, merged + 1e-3 * noise(300, 300, seed=1), merged)
    assert there_and_back(expert, Prediction(merged, None, torch.float32)) < 0.07 * 17 + 0.5


def test_the_offset_helps_the_rows_it_fits() -> None:
    left, right, merged = 1e-2 * noise(200, 3), noise(3, 100), noise(200, 100)
    expert = merged + left @ right + 1e-4 * noise(200, 100, seed=1)
    expert[:50] = merged[:50] + 1e-4 * noise(50, 100, seed=3)
    with_offset = there_and_back(expert, Prediction(merged, Factors(left, right), torch.float32))
    assert with_offset < there_and_back(expert, Prediction(merged, None, torch.float32)) - 4


def test_bfloat16_stored_as_float32_costs_what_bfloat16_costs() -> None:
    merged = 0.05 * noise(200, 200)
    expert = (merged + 1e-3 * noise(200, 200, seed=1)).bfloat16()
    narrow = there_and_back(expert, Prediction(merged, None, torch.bfloat16))
    wide = there_and_back(expert.float(), Prediction(merged, None, torch.float32))
    assert wide < narrow + 0.1


def test_outliers_cost_themselves_alone() -> None:
    merged = noise(200, 200)
    expert = merged + 1e-3 * noise(200, 200, seed=1)
    before = there_and_back(expert, Prediction(merged, None, torch.float32))
    expert[::20, ::20] *= -1e6
    assert there_and_back(expert, Prediction(merged, None, torch.float32)) < before + 0.5


def test_random_bits_are_stored_as_they_are() -> None:
    words = torch.randint(-(2**31), 2**31 - 1, (100, 100), generator=torch.Generator().manual_seed(0))
    expert = words.to(torch.int32).view(torch.float32).nan_to_num()
    assert there_and_back(expert, Prediction(torch.zeros(100, 100), None, torch.float32)) < 32.1


def test_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    merged = noise(100, 30)
    expert = merged + 1e-3 * noise(100, 30, seed=1)
    pair = Factors(1e-3 * noise(100, 2), noise(2, 30))
    monkeypatch.setattr(lossless, "TOGETHER", 700)
    there_and_back(expert, Prediction(merged, pair, torch.float32))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 7))
def test_one_wrong_bit_is_noticed(at: int, bit: int) -> None:
    merged = noise(20, 20)
    prediction = Prediction(merged, None, torch.float32)
    data = bytearray(lossless.encode(merged + 1e-3 * noise(20, 20, seed=1), prediction))
    data[at % len(data)] ^= 1 << bit
    with pytest.raises(CorruptOffsets):
        restored(bytes(data), prediction, torch.float32)


@settings(max_examples=150, deadline=None)
@given(st.integers(4, 10**6), st.integers(1, 255))
def test_damage_behind_a_right_checksum_is_noticed(at: int, change: int) -> None:
    merged = noise(20, 20)
    prediction, expert = Prediction(merged, None, torch.float32), merged + 1e-3 * noise(20, 20, seed=1)
    data = bytearray(lossless.encode(expert, prediction))
    data[4 + at % (len(data) - 4)] ^= change
    try:
        found = restored(lossless.checked(bytes(data[4:])), prediction, torch.float32)
    except (CorruptOffsets, OtherPrediction):
        return
    assert torch.equal(bits(found), bits(expert))  # a bit that fills up a byte


def test_another_prediction_is_noticed() -> None:
    merged = noise(20, 20)
    data = lossless.encode(merged + 1e-3 * noise(20, 20, seed=1), Prediction(merged, None, torch.float32))
    merged[3, 4] = torch.nextafter(merged[3, 4], torch.tensor(9.0))
    with pytest.raises(OtherPrediction, match="and not"):
        restored(data, Prediction(merged, None, torch.float32), torch.float32)


def test_too_short_is_damaged() -> None:
    with pytest.raises(CorruptOffsets):
        restored(b"123", Prediction(noise(3, 3), None, torch.float32), torch.float32)
