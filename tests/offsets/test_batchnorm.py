"""Two vectors with the function of four."""

import pytest
import torch

from retex_cli.offsets.batchnorm import DEPTHWISE_WEIGHT, SHIFT_WEIGHT, Norm, folded, norms, weights
from retex_cli.offsets.domain import from_domain, to_domain
from retex_cli.offsets.fit import FOLDED, OffsetFitter
from retex_cli.offsets.stream import decode
from retex_cli.offsets.trainable import Trainable

NORM = Norm("n.weight", "n.bias", "n.running_mean", "n.running_var")
EPSILON = 1e-3


def vectors(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    values = [torch.randn(4, 9, generator=draw)[i] for i in range(4)]
    return dict(zip(NORM.names, (1 + 0.1 * values[0], values[1], values[2], values[3].square() + 0.01), strict=True))


def output(x: torch.Tensor, four: dict[str, torch.Tensor]) -> torch.Tensor:
    weight, bias, mean, variance = (four[name] for name in NORM.names)
    return torch.nn.functional.batch_norm(x, mean, variance, weight, bias, eps=EPSILON)


def test_the_function_is_the_experts_and_mean_and_weight_are_merged() -> None:
    expert, merged, x = vectors(0), vectors(1), torch.randn(20, 9, generator=torch.Generator().manual_seed(2))
    found = folded(NORM, expert.__getitem__, merged.__getitem__, EPSILON).values
    assert torch.equal(found[NORM.weight], merged[NORM.weight])
    assert torch.equal(found[NORM.mean], merged[NORM.mean])
    torch.testing.assert_close(output(x, found), output(x, expert), rtol=1e-4, atol=1e-4)
    assert (output(x, merged) - output(x, expert)).abs().max() > 0.5


def test_a_weight_that_changes_its_sign_leaves_the_layer_as_it_is() -> None:
    expert, merged = vectors(0), vectors(1)
    expert[NORM.weight][3] *= -1
    found = folded(NORM, expert.__getitem__, merged.__getitem__, EPSILON).values
    assert all(torch.equal(found[name], expert[name]) for name in NORM.names)


def test_the_bias_goes_with_the_variance_that_was_coded() -> None:
    expert, merged = vectors(0), vectors(1)
    merged[NORM.mean] += 40  # what a small error of the variance is multiplied by
    found = folded(NORM, expert.__getitem__, merged.__getitem__, EPSILON)
    exact = to_domain(NORM.variance, found.values[NORM.variance]) - to_domain(NORM.variance, merged[NORM.variance])
    off = exact + 0.05 * torch.randn(9, generator=torch.Generator().manual_seed(4))
    coded = found.values | {
        NORM.variance: from_domain(NORM.variance, to_domain(NORM.variance, merged[NORM.variance]) + off)
    }
    followed = coded | {NORM.bias: merged[NORM.bias] + found.pivots[NORM.bias].offset(off)}
    x = expert[NORM.mean] + torch.randn(200, 9, generator=torch.Generator().manual_seed(2))
    wanted = output(x, expert)
    assert (output(x, followed) - wanted).abs().max() < 0.2 * (output(x, coded) - wanted).abs().max()
    at_mean = expert[NORM.mean][None]
    torch.testing.assert_close(output(at_mean, followed), expert[NORM.bias][None], rtol=1e-3, atol=1e-3)


def test_a_fit_and_a_training_code_the_bias_that_goes_with_the_coded_variance() -> None:
    names = {NORM.bias: "bias", NORM.variance: "variance"}
    draw = torch.Generator().manual_seed(0)
    expert = {name: torch.rand(200, generator=draw) + 0.5 for name in NORM.names}
    merged = {name: torch.rand(200, generator=draw) + 0.5 for name in NORM.names}
    merged[NORM.mean] += 10
    found = folded(NORM, expert.__getitem__, merged.__getitem__, EPSILON)
    layout = [(name, (200,)) for name in sorted(names)]
    fitter = OffsetFitter(layout, 300)
    for name in names:
        delta = to_domain(name, found.values[name]) - to_domain(name, merged[name])
        fitter.update(name, fitter.prepare(delta), found.pivots.get(name))

    def far(data: bytes) -> float:
        factors = decode(data, layout)
        bias, variance = (factors[name].add_to(torch.zeros(200), 0) for name in names)
        return float((bias - found.pivots[NORM.bias].offset(variance)).norm() / bias.norm())

    assert far(fitter.finish()) < 0.05
    ignoring = OffsetFitter(layout, 300)
    for name in names:
        ignoring.update(name, fitter.prepare(to_domain(name, found.values[name]) - to_domain(name, merged[name])))
    assert far(ignoring.finish()) > 3 * far(fitter.finish())
    trainable = Trainable(fitter.components(), fitter.pivots)
    with torch.no_grad():  # the variance moves in training, the bias alone does not
        for parameter in trainable.parameters:
            parameter.mul_(0.7)
    trainable.settle()
    assert far(fitter.encode(trainable.kept())) < 0.05
    bias = trainable.factors(NORM.bias)[0]
    (gradient,) = torch.autograd.grad(bias.sum(), [p for p in trainable.parameters if p.abs().sum() > 0][:1])
    assert gradient.norm() > 0


def test_channels_without_weight_or_variance_stay_finite() -> None:
    expert, merged = vectors(0), vectors(1)
    expert[NORM.weight][2] = merged[NORM.weight][2] = 0
    expert[NORM.variance][4] = 0
    found = folded(NORM, expert.__getitem__, merged.__getitem__, EPSILON).values
    assert all(value.isfinite().all() for value in found.values())


def test_layers_are_told_by_their_names_and_shapes() -> None:
    layout = [(name, (9,)) for name in NORM.names]
    layout += [
        ("bare.running_mean", (4,)),
        ("bare.running_var", (4,)),
        ("dw.weight", (9, 1, 3, 3)),
        ("pw", (9, 9, 1, 1)),
    ]
    assert norms(layout) == [NORM]
    assert weights(layout) == dict.fromkeys(NORM.names, SHIFT_WEIGHT) | {"dw.weight": DEPTHWISE_WEIGHT}
    assert weights([("dw.weight", (9, 1, 3, 3)), ("a", (3,))]) == {}, "a network without BatchNorm is left alone"


@pytest.mark.parametrize(("share", "expected"), [(FOLDED / 2, 1.0), (20 * FOLDED, 2.0)])
def test_a_fitter_folds_when_bytes_are_few(share: float, expected: float) -> None:
    layout = [("v", (4000,))]
    fitter = OffsetFitter(layout, int(share * 16000))
    own, other = torch.full((4000,), 2.0), torch.full((4000,), 1.0)
    fitter.update("v", fitter.prepare(own))
    fitter.fold("v", fitter.prepare(other))
    assert float(decode(fitter.finish(), layout)["v"].left.mean()) == pytest.approx(expected, rel=0.05)
