"""Where tensors go in a module: by any of their names, the same objects afterwards, or refused before a write."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from retex_cli.errors import RetexError
from retex_cli.serving.places import Places, Wanted, fill, lend


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.embed.weight


def wanted(*names: str, shape: tuple[int, ...], also: tuple[int, ...] | None = None, required: bool = True) -> Wanted:
    return Wanted(names, (shape,) if also is None else (shape, also), required)


def test_the_first_name_that_is_there_is_the_place() -> None:
    model = Tied()
    found = Places(model).match([wanted("x.weight", "embed.weight", "norm.weight", shape=(5, 3))])
    fill(found[0], 0, torch.ones(15))
    assert (model.embed.weight == 1).all()


def test_parameters_stay_the_same_objects_and_tied_ones_tied() -> None:
    model = Tied()
    before = dict(model.named_parameters())
    (place,) = Places(model).match([wanted("embed.weight", shape=(5, 3))])
    fill(place, 0, torch.full((15,), 7.0))
    assert all(value is before[name] for name, value in model.named_parameters())
    assert model.out.weight is model.embed.weight
    assert (model.out.weight == 7).all()
    assert model.out.weight.requires_grad


def test_a_gradient_of_the_old_values_is_refused() -> None:
    model = Tied()
    loss = model.out(model.embed(torch.tensor([1]))).sum()
    (place,) = Places(model).match([wanted("embed.weight", shape=(5, 3))])
    with torch.inference_mode():
        fill(place, 0, torch.zeros(15))
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_rounding_is_to_the_type_of_the_place() -> None:
    place, value = torch.zeros(3, dtype=torch.bfloat16), torch.tensor([1.001, 2.003, -1e-3])
    fill(place, 0, value.flatten())
    assert torch.equal(place, value.bfloat16())


@pytest.mark.parametrize("rows", [3, 7])
def test_only_the_rows_that_both_have_are_written(rows: int) -> None:
    (place,) = Places(Tied()).match([wanted("embed.weight", shape=(rows, 3), also=(5, 3))])
    place.zero_()
    fill(place, 0, torch.ones(3 * rows))
    assert place.sum() == 3 * min(rows, 5)


def test_a_scalar_has_a_place() -> None:
    (place,) = Places(Tied()).match([wanted("norm.num_batches_tracked", shape=())])
    fill(place, 0, torch.tensor([4]))
    assert place == 4


def test_what_is_not_required_may_be_absent_or_of_another_shape() -> None:
    found = Places(Tied()).match(
        [wanted("pooler", shape=(2,), required=False), wanted("norm.bias", shape=(9,), required=False)]
    )
    assert found == [None, None]


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("pooler.weight", (2, 2), ["pooler.weight", "no place in Tied"]),
        ("norm.bias", (9,), ["norm.bias", "[9]", "[3]"]),
    ],
)
def test_what_is_required_is_refused_by_name(name: str, shape: tuple[int, ...], words: list[str]) -> None:
    with pytest.raises(RetexError) as caught:
        Places(Tied()).match([wanted(name, shape=shape)])
    assert all(word in caught.value.message for word in words)
    assert "head=False" in str(caught.value.hint)


def test_a_model_without_memory_is_refused() -> None:
    with pytest.raises(RetexError, match=r"embed\.weight.*meta device"):
        Places(Tied().to("meta")).match([wanted("embed.weight", shape=(5, 3))])


def test_of_two_tensors_for_one_memory_the_first_name_of_the_module_has_it() -> None:
    model = Tied()
    found = Places(model).match([wanted("out.weight", shape=(5, 3)), wanted("embed.weight", shape=(5, 3))])
    assert found[0] is None
    assert found[1].data_ptr() == model.embed.weight.data_ptr()


def test_a_value_made_in_its_place_is_there_already() -> None:
    place = torch.zeros(4)
    fill(place, 0, place.add_(2).view(-1))
    assert place.tolist() == [2, 2, 2, 2]


def test_left_over_is_what_shares_no_memory_with_a_filled_place() -> None:
    places = Places(Tied())
    filled = places.match([wanted(name, shape=(5, 3)) for name in ("out.weight",)])
    assert places.left_over(place for place in filled if place is not None) == [
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
    ]


def test_lent_memory_is_seen_by_all_that_have_it_and_ties_hold() -> None:
    one, other = Tied(), Tied()
    kept = dict(one.named_parameters())
    for model in (one, other):
        places = Places(model)
        (place,) = places.match([wanted("embed.weight", shape=(5, 3))])
        memory = torch.zeros(5, 3) if model is one else one.embed.weight.data
        lend(places.variable(place), memory)
    (place,) = Places(one).match([wanted("embed.weight", shape=(5, 3))])
    fill(place, 0, torch.full((15,), 7.0))
    assert all((weight == 7).all() for weight in (one.out.weight, other.embed.weight, other.out.weight))
    assert one.embed.weight is kept["embed.weight"]
    assert one.embed.weight.data_ptr() == other.out.weight.data_ptr()


def test_memory_of_another_kind_is_not_taken() -> None:
    model = Tied()
    before = model.embed.weight.data_ptr()
    lend(model.embed.weight, torch.zeros(5, 3, dtype=torch.bfloat16))
    lend(model.embed.weight, torch.zeros(4, 3))
    assert model.embed.weight.data_ptr() == before
