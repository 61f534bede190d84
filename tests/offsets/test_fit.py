"""From an offset to bytes and back: exact at a generous budget, within budget at a small one, better with more."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch

from retex_cli.offsets import blocks
from retex_cli.offsets.coder import CorruptOffsets
from retex_cli.offsets.decompose import as_matrix
from retex_cli.offsets.fit import BudgetTooSmall, OffsetFitter
from retex_cli.offsets.predict import Predictor
from retex_cli.offsets.stream import Factors, decode

CPU = torch.device("cpu")
SHAPES = {
    "a.weight": (48, 32),
    "b.bias": (48,),
    "c.conv": (16, 8, 3, 3),
    "d.scale": (),
    "e.empty": (0, 4),
    "f.wide": (8, 200),
}
LAYOUT = sorted(SHAPES.items())


@pytest.fixture
def deltas() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    made = {}
    for name, shape in LAYOUT:
        noise = torch.randn(shape, generator=generator) * 0.01
        if len(shape) == 2 and noise.numel():
            noise += torch.outer(torch.randn(shape[0], generator=generator), torch.randn(shape[1], generator=generator))
        made[name] = noise
    return made


def fit(deltas: dict[str, torch.Tensor], budget: int, lead: float = 0.0) -> bytes:
    fitter = OffsetFitter(LAYOUT, budget, lead=lead)
    for name, delta in deltas.items():
        fitter.update(name, fitter.prepare(delta))
    return fitter.finish()


def recovered(data: bytes) -> dict[str, torch.Tensor]:
    factors = decode(data, LAYOUT)
    return {name: delta(factors, name, shape) for name, shape in LAYOUT}


def delta(factors: Mapping[str, Factors], name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A decoded offset; zeros where there is none."""
    zeros = torch.zeros(shape)
    return factors[name].add_to(zeros.view(-1), 0).view(shape) if name in factors else zeros


def error(deltas: dict[str, torch.Tensor], data: bytes) -> float:
    back = recovered(data)
    lost = sum((deltas[name] - back[name]).square().sum().item() for name in deltas)
    return lost / sum(delta.square().sum().item() for delta in deltas.values())


def test_a_large_budget_gives_the_offsets_back(deltas: dict[str, torch.Tensor]) -> None:
    data = fit(deltas, 100_000)
    assert error(deltas, data) < 1e-4
    assert error(deltas, fit(deltas, 200)) > 1e-3


def test_within_budget_and_more_is_never_worse(deltas: dict[str, torch.Tensor]) -> None:
    before = 1.0
    for budget in (120, 200, 400, 800, 1600, 3200, 6400):
        data = fit(deltas, budget)
        assert 0.75 * budget <= len(data) <= budget
        assert error(deltas, data) <= before
        before = error(deltas, data)


def test_what_is_kept_is_stretched_by_what_is_left_out() -> None:
    offset = torch.diag(torch.tensor([4.0] + [1.0] * 63))
    found = []
    for lead in (0.0, 0.2):
        fitter = OffsetFitter([("w", (64, 64))], 60, lead=lead)
        fitter.update("w", fitter.prepare(offset))
        found.append(delta(decode(fitter.finish(), [("w", (64, 64))]), "w", (64, 64)))
    least, stretched = found
    kept = float(least.square().sum() / offset.square().sum())
    assert 0.1 < kept < 0.5, "something is left out"
    assert stretched.norm() / least.norm() == pytest.approx(kept**-0.2, rel=0.02)
    cosine = (least * stretched).sum() / least.norm() / stretched.norm()
    assert cosine > 0.99, "in the same direction"


def test_the_budget_is_met_within_two_percent_on_a_larger_model() -> None:
    generator = torch.Generator().manual_seed(0)
    layout = [(f"layer.{i}", (64, 96)) for i in range(12)]
    fitter = OffsetFitter(layout, 6000)
    for name, shape in layout:
        fitter.update(name, fitter.prepare(torch.randn(shape, generator=generator)))
    assert 0.98 * 6000 <= len(fitter.finish()) <= 6000


def test_the_order_of_updates_does_not_matter(deltas: dict[str, torch.Tensor]) -> None:
    assert fit(dict(reversed(deltas.items())), 500) == fit(deltas, 500)


def test_no_offset_costs_next_to_nothing(deltas: dict[str, torch.Tensor]) -> None:
    data = fit({name: torch.zeros_like(delta) for name, delta in deltas.items()}, 500)
    assert len(data) < 40
    assert decode(data, LAYOUT) == {}


def test_a_budget_below_the_least_names_the_least(deltas: dict[str, torch.Tensor]) -> None:
    with pytest.raises(BudgetTooSmall) as caught:
        fit(deltas, 3)
    assert len(fit(deltas, caught.value.minimum)) <= caught.value.minimum


def test_convolutions_are_matrices_of_their_outputs() -> None:
    assert as_matrix(torch.zeros(16, 8, 3, 3)).shape == (16, 72)


def test_another_layout_is_refused(deltas: dict[str, torch.Tensor]) -> None:
    with pytest.raises(CorruptOffsets):
        decode(fit(deltas, 500), LAYOUT[:-1])


def test_the_predictor_is_linear_in_the_task_embedding(deltas: dict[str, torch.Tensor]) -> None:
    other = {name: torch.flip(delta, (0,)) if delta.ndim else delta for name, delta in deltas.items()}
    predictor = Predictor({"x": decode(fit(deltas, 900), LAYOUT), "y": decode(fit(other, 900), LAYOUT)})
    mix = {"x": 0.25, "y": 0.75}
    x, y, mixed = (offset(predictor, "a.weight", each) for each in ({"x": 1.0}, {"y": 1.0}, mix))
    assert not torch.allclose(x, y)
    torch.testing.assert_close(mixed, 0.25 * x + 0.75 * y)
    assert torch.equal(offset(predictor, "a.weight", {**mix, "z": 0.0}), mixed)
    assert predictor.offset("e.empty", {"x": 1.0}, CPU) is None
    assert predictor.tasks == ("x", "y")


def offset(predictor: Predictor, name: str, embedding: dict[str, float]) -> torch.Tensor:
    found = predictor.offset(name, embedding, CPU)
    assert found is not None
    return found.add_to(torch.zeros(math.prod(SHAPES[name])), 0).view(SHAPES[name])


@pytest.mark.parametrize("name", ["a.weight", "b.bias", "c.conv", "f.wide"])
def test_it_is_added_block_by_block_where_it_is_wanted(
    deltas: dict[str, torch.Tensor], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor, merged = Predictor({"x": dict(decode(fit(deltas, 5000), LAYOUT))}), torch.ones(SHAPES[name])
    wanted = predictor.add_to(name, merged, {"x": 1.0}, CPU)
    torch.testing.assert_close(wanted, merged + offset(predictor, name, {"x": 1.0}))
    for _ in range(2):  # what is kept stays as it is
        assert torch.equal(predictor.add_to(name, merged, {"x": 1.0}, CPU), wanted)
    monkeypatch.setattr(blocks, "BLOCK", 70)
    torch.testing.assert_close(predictor.add_to(name, merged, {"x": 1.0}, CPU), wanted)
    found, out = predictor.offset(name, {"x": 1.0}, CPU), torch.empty_like(merged).view(-1)
    assert found is not None
    assert found.add_to(merged.view(-1), 0, out).data_ptr() == out.data_ptr()
    assert torch.equal(out.view(merged.shape), wanted)
    assert found.add_to(merged.view(-1), 0, merged.view(-1)).data_ptr() == merged.data_ptr()
    assert torch.equal(merged, wanted)


@pytest.mark.parametrize(
    ("name", "narrow"), [("a.weight", True), ("c.conv", True), ("f.wide", True), ("b.bias", False)]
)
def test_a_matrix_may_be_added_in_bfloat16_and_is_rounded_once(
    deltas: dict[str, torch.Tensor], name: str, narrow: bool
) -> None:
    predictor = Predictor({"x": dict(decode(fit(deltas, 5000), LAYOUT))})
    merged = torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(3)).bfloat16().view(-1)
    exact, found = (predictor.offset(name, {"x": 1.0}, CPU, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert exact is not None
    assert found is not None
    assert found.dtype == (torch.bfloat16 if narrow else torch.float32)
    wanted, sums = exact.add_to(merged, 0), found.add_to(merged, 0)
    assert sums.dtype == found.dtype
    size = exact.add_to(torch.zeros_like(merged), 0).abs().max()  # of the offset, whose factors are rounded, too
    assert bool(((sums.float() - wanted).abs() <= 2**-8 * wanted.abs() + 2**-6 * size).all())
    mix = predictor.offset(name, {"x": 0.5}, CPU, torch.bfloat16)
    assert mix is not None
    assert mix.dtype == found.dtype, "one task is rounded once, whatever its share"


def test_mixes_and_variances_are_added_in_float32(deltas: dict[str, torch.Tensor]) -> None:
    coded = decode(fit(deltas, 900), LAYOUT)
    predictor = Predictor(
        {"x": {"w": coded["a.weight"], "running_var": coded["a.weight"]}, "y": {"w": coded["a.weight"]}}
    )
    for name, embedding in (("w", {"x": 0.5, "y": 0.5}), ("running_var", {"x": 1.0})):
        found = predictor.offset(name, embedding, CPU, torch.bfloat16)
        assert found is not None
        assert found.dtype == torch.float32


def test_what_no_task_has_stays_the_tensor_it_is(deltas: dict[str, torch.Tensor]) -> None:
    predictor, merged = Predictor({"x": decode(fit(deltas, 900), LAYOUT)}), torch.ones(0, 4)
    assert predictor.add_to("e.empty", merged, {"x": 1.0}, CPU) is merged


def steep(shape: tuple[int, int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=generator)).Q
    right = torch.linalg.qr(torch.randn(shape[1], min(shape), generator=generator)).Q
    return (left * torch.arange(1, min(shape) + 1).float() ** -0.3) @ right.T


def test_few_components_are_looked_for_and_more_where_the_budget_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = [("large", (400, 2000)), ("small", (300, 300))]
    deltas = {"large": 0.01 * steep((400, 2000), 1), "small": steep((300, 300), 2)}
    fitter = OffsetFitter(layout, 12_000)
    for name, delta in deltas.items():
        fitter.update(name, fitter.prepare(delta))
    assert set(fitter.short()) == {"small"}, "all of the energy is there, not only its share by size"
    rounds = 0
    while short := fitter.short():
        rounds += 1
        for name, rank in short.items():
            fitter.update(name, fitter.prepare(deltas[name], rank))
    assert 0 < rounds < 10
    found = fitter.finish()
    monkeypatch.setattr(OffsetFitter, "first_rank", lambda self, shape: 300)
    whole = OffsetFitter(layout, 12_000)
    for name, delta in deltas.items():
        whole.update(name, whole.prepare(delta))
    assert whole.short() == {}
    ours, best = (lost(layout, deltas, data) for data in (found, whole.finish()))
    assert ours <= 1.01 * best


def lost(layout: list[tuple[str, tuple[int, int]]], deltas: dict[str, torch.Tensor], data: bytes) -> float:
    factors = decode(data, layout)
    back = {name: delta(factors, name, shape) for name, shape in layout}
    return sum((deltas[name] - back[name]).square().sum().item() for name in deltas)


def test_what_has_no_more_components_is_not_looked_at_for_ever() -> None:
    generator = torch.Generator().manual_seed(6)
    low = torch.randn(400, 3, generator=generator) @ torch.randn(3, 500, generator=generator)  # as of a LoRA adapter
    fitter = OffsetFitter([("a", (400, 500))], 20_000)
    fitter.update("a", fitter.prepare(low))
    assert fitter.short() == {}
    few = fitter.prepare(steep((400, 500), 4), 2)
    fitter.update("a", few)
    fitter.update("a", few)
    assert fitter.short() == {}, "asked again, no more were found"
