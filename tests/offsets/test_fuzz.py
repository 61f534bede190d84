"""Damaged bytes end in ``CorruptOffsets`` or in numbers, never in a crash, a hang or a request for all the memory."""

from __future__ import annotations

import math
import resource

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retex_cli.io.provenance import tensor_digest
from retex_cli.offsets import coder, lossless, stream
from retex_cli.offsets.coder import CorruptOffsets
from retex_cli.offsets.fit import OffsetFitter
from retex_cli.offsets.fixed import Prediction
from retex_cli.offsets.lossless import Correction, OtherPrediction

LAYOUT = [("a", (48, 32)), ("b", (48,)), ("c", (8, 2, 3, 3)), ("d", ()), ("e", (0, 4))]
QUICKLY = settings(max_examples=200, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
Damage = list[tuple[int, int]]
FLIPS = st.lists(st.tuples(st.integers(0, 2**20), st.integers(1, 255)), min_size=1, max_size=4)


def restored(data: bytes, prediction: Prediction, dtype: torch.dtype) -> torch.Tensor:
    """All blocks of a correction, checked as a whole."""
    correction = Correction(lambda start, stop: data[start:stop], len(data), *prediction.shape, dtype)
    found = [correction.restore(k, prediction) for k in range(len(correction.blocks))]
    whole = torch.cat([torch.empty(0, prediction.shape[1], dtype=dtype), *found])
    correction.check(tensor_digest(whole))
    return whole


def hurt(data: bytes, flips: Damage, cut: float) -> bytes:
    damaged = bytearray(data[: math.ceil(cut * len(data))])
    for at, mask in flips if damaged else ():
        damaged[at % len(damaged)] ^= mask
    return bytes(damaged)


@pytest.fixture(scope="module")
def coded() -> bytes:
    generator = torch.Generator().manual_seed(1)
    fitter = OffsetFitter(LAYOUT, 900)
    for name, shape in LAYOUT:
        fitter.update(name, fitter.prepare(torch.randn(shape, generator=generator)))
    return fitter.finish()


@QUICKLY
@given(flips=FLIPS, cut=st.one_of(st.just(1.0), st.floats(0, 1)))
def test_damaged_offsets(coded: bytes, flips: Damage, cut: float) -> None:
    try:
        factors = stream.decode(hurt(coded, flips, cut), LAYOUT)
    except CorruptOffsets:
        return
    shapes = dict(LAYOUT)
    for name, found in factors.items():
        found.add_to(torch.zeros(math.prod(shapes[name])), 0)
        columns = 0 if found.right is None else found.right.shape[1]
        assert (found.left.shape[0], columns) == stream.sides(shapes[name])


@QUICKLY
@given(flips=FLIPS, cut=st.one_of(st.just(1.0), st.floats(0, 1)), size=st.sampled_from([2, 3, 16]))
def test_damaged_sequences_of_symbols_that_are_coded_as_one(flips: Damage, cut: float, size: int) -> None:
    symbols = np.zeros(5000, dtype=np.int64)
    symbols[:size] = range(size)
    data = coder.encode([symbols, symbols[:10]])
    try:
        found = coder.decode(hurt(data, flips, cut), max_symbols=6000)
    except CorruptOffsets:
        return
    assert sum(map(len, found)) <= 6000


@QUICKLY
@given(data=st.binary(max_size=60))
def test_bytes_that_were_never_offsets(data: bytes) -> None:
    try:
        assert not stream.decode(data, LAYOUT)
    except CorruptOffsets:
        return


@QUICKLY
@given(flips=FLIPS, cut=st.one_of(st.just(1.0), st.floats(0, 1)), checked=st.booleans())
def test_damaged_corrections_never_give_another_tensor(flips: Damage, cut: float, checked: bool) -> None:
    expert = torch.randn(20, 30, generator=torch.Generator().manual_seed(2))
    predicted = Prediction(expert + 1e-3, None, torch.float32)
    data = lossless.encode(expert, predicted)
    damaged = hurt(data, flips, cut)
    if checked:  # as if the damage had come before the checksum: the decoder itself sees it
        damaged = lossless.checked(hurt(data[4:], flips, cut))
    try:
        assert torch.equal(restored(damaged, predicted, torch.float32), expert)
    except (CorruptOffsets, OtherPrediction):
        return


@pytest.mark.parametrize("announced", [10**6, 10**9, 2**55])
def test_a_length_that_is_damage_asks_for_no_memory(announced: int) -> None:
    head = bytearray()
    for value in (1, announced, 0, 0, 2, 1, 1):
        coder._put_varint(head, value)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorruptOffsets):
        stream.decode(bytes(head), LAYOUT)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
