"""What a training sees is what the decoder makes of the file."""

import pytest
import torch

from retex_cli.offsets.fit import OffsetFitter
from retex_cli.offsets.stream import decode
from retex_cli.offsets.trainable import Trainable

SHAPES = {"a.weight": (48, 32), "b.bias": (48,), "c.conv": (16, 8, 3, 3), "f.wide": (8, 200)}
LAYOUT = sorted(SHAPES.items())


@pytest.fixture
def fitter() -> OffsetFitter:
    generator = torch.Generator().manual_seed(3)
    fitter = OffsetFitter(LAYOUT, 900)
    for name, shape in LAYOUT:
        fitter.update(name, fitter.prepare(torch.randn(shape, generator=generator) * 0.01))
    return fitter


def test_untouched_components_give_the_same_bytes(fitter: OffsetFitter) -> None:
    assert fitter.encode(Trainable(fitter.components(), fitter.pivots).kept()) == fitter.finish()


def test_the_training_computes_with_decoded_values(fitter: OffsetFitter) -> None:
    trainable = Trainable(fitter.components(), fitter.pivots)
    with torch.no_grad():
        for parameter in trainable.parameters:  # a drift that changes scales and symbols
            parameter.mul_(1.7).add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    trainable.settle()
    back = decode(fitter.encode(trainable.kept()), LAYOUT)
    assert set(back) == set(trainable.names)
    for name in trainable.names:
        left, right = trainable.factors(name)
        ours = left if right is None else left @ right
        theirs = back[name].add_to(torch.zeros(ours.numel()), 0).view(ours.shape)
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


def test_gradients_pass_the_rounding(fitter: OffsetFitter) -> None:
    trainable = Trainable(fitter.components(), fitter.pivots)
    for name in trainable.names:
        left, right = trainable.factors(name)
        (left if right is None else left @ right).square().sum().backward()  # type: ignore[no-untyped-call]
    for parameter in trainable.parameters:
        assert parameter.grad is not None
        assert parameter.grad.norm() > 0


def test_components_that_do_not_fit_are_left_out_weakest_first(fitter: OffsetFitter) -> None:
    kept = fitter.components()
    whole = fitter.encode_within(kept)
    fitter.budget = len(whole) // 2
    half = fitter.encode_within(kept)
    assert len(half) <= len(whole) // 2
    before, after = decode(whole, LAYOUT), decode(half, LAYOUT)
    assert set(after) <= set(before)
    assert 0 < sum(f.left.shape[1] for f in after.values()) < sum(f.left.shape[1] for f in before.values())
