from __future__ import annotations

import pytest
import torch

from retex_cli.errors import RetexError
from retex_cli.signatures.features import (
    Layout,
    check,
    check_layout,
    concatenate,
    layer_weights,
    layer_widths,
    unit_layers,
    vectors,
)


def test_worked_example() -> None:
    features = torch.tensor([[[3.0, 4.0], [0.0, 2.0]], [[4.0, -3.0], [0.0, 5.0]]])
    units = unit_layers(features)
    torch.testing.assert_close(units[0], torch.tensor([[0.6, 0.8], [0.0, 1.0]], dtype=torch.float64))
    # layer 0 deviates from its mean (0.7, 0.1) by (0.1, 0.7) and back: mean square 0.25, so spread 0.5 and weight 2
    weights = layer_weights([units])
    assert weights[0] == pytest.approx(2.0)
    rows = concatenate(units, Layout((1, 0), (3.0, 2.0), (2, 2), 2, 2))
    torch.testing.assert_close(rows[1], torch.tensor([0.0, 3.0, 1.6, -1.2], dtype=torch.float64))


def test_weights_give_every_layer_unit_variance_within_tasks(clouds) -> None:
    units = [unit_layers(part * torch.tensor([1.0, 30.0, 0.01])[:, None]) for part in clouds("ab", 40).values()]
    weights = layer_weights(units)
    scaled = [unit * torch.tensor(weights)[:, None] for unit in units]
    pooled = torch.cat([part - part.mean(0) for part in scaled])
    torch.testing.assert_close((pooled**2).mean((0, 2)), torch.ones(3, dtype=torch.float64))


def test_a_constant_layer_is_not_blown_up(clouds) -> None:
    features = clouds("a", 40)["a"]
    features[:, 1] = features[0, 1]
    assert layer_weights([unit_layers(features)])[1] == pytest.approx(1e3 * 12**0.5)


def test_scoring_rows_are_the_fitted_rows_in_single_precision(clouds) -> None:
    features = clouds("a", 20)["a"]
    layout = Layout((0, 2), (1.5, 7.0), (12, 12), 3, 12)
    rows = vectors(features, layout)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.double(), concatenate(unit_layers(features), layout), rtol=1e-5, atol=1e-6)


def test_a_zero_vector_stays_zero() -> None:
    layout = Layout((0,), (5.0,), (4,), 1, 4)
    assert torch.equal(vectors(torch.zeros(2, 1, 4), layout), torch.zeros(2, 4))
    assert torch.equal(unit_layers(torch.zeros(2, 1, 4)), torch.zeros(2, 1, 4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (torch.zeros(4, 8), "float32 [4, 8], expected floating [inputs, layers, width]"),
        (torch.zeros(4, 2, 8, dtype=torch.int64), "int64 [4, 2, 8]"),
        (torch.zeros(4, 0, 8), "[4, 0, 8]"),
        (torch.zeros(1, 2, 8), "1 inputs, at least 2"),
        (torch.zeros(3, 2, 2).index_put((torch.tensor(2), torch.tensor(0)), torch.tensor(torch.nan)), "of input 2"),
        (torch.full((3, 2, 2), torch.inf), "of input 0"),
    ],
)
def test_unusable_features_are_refused_with_their_place(features: torch.Tensor, words: str) -> None:
    with pytest.raises(RetexError) as caught:
        check(features, "task 'cars'", least=2)
    assert caught.value.message.startswith("task 'cars': ")
    assert words in caught.value.message


def test_another_encoders_shape_is_refused_with_both() -> None:
    with pytest.raises(RetexError, match="4 layers of width 8, the signatures have 3 of 12"):
        check_layout(torch.zeros(2, 4, 8), Layout((0,), (1.0,), (12,), 3, 12), "the inputs")


def test_padding_takes_no_room() -> None:
    """The second layer is one narrower than the first: its last entry is zero in every input of every task."""
    features = torch.rand(6, 2, 3, generator=torch.Generator().manual_seed(0)) + 0.1
    features[:, 1, 2] = 0
    features[0, 1, 1] = 0  # once is not always
    assert layer_widths([unit_layers(features[:3]), unit_layers(features[3:])]) == (3, 2)
    layout = Layout((0, 1), (1.0, 1.0), (3, 2), 2, 3)
    assert layout.size == 5
    torch.testing.assert_close(vectors(features, layout).norm(dim=1), torch.full((6,), 2**0.5))
    assert layer_widths([torch.zeros(4, 1, 3)]) == (1,)
