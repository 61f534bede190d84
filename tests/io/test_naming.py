from __future__ import annotations

from collections.abc import Mapping

import pytest

from retex_cli.errors import RetexError
from retex_cli.io.naming import (
    Prefix,
    canonical,
    find_prefix,
    is_buffer,
    is_output_module,
    is_vocabulary,
    strip,
)

BODY = {"embeddings.word.weight": (9, 4), "encoder.layer.0.w": (4, 4), "encoder.layer.1.w": (4, 4)}


def under(prefix: str, names: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {prefix + name: shape for name, shape in names.items()}


@pytest.mark.parametrize(
    ("base", "expert", "expected"),
    [
        ("", "", Prefix("", "")),
        ("", "bert.", Prefix("", "bert.")),
        ("model.", "", Prefix("model.", "")),
        ("", "model.encoder_stack.", Prefix("", "model.encoder_stack.")),
        ("bert.", "roberta.", Prefix("bert.", "roberta.")),
    ],
)
def test_the_prefix_is_found_from_names_and_shapes(base: str, expert: str, expected: Prefix) -> None:
    theirs = {**under(expert, BODY), "classifier.weight": (2, 4)}
    assert find_prefix(under(base, BODY), theirs, "x") == expected


def test_shapes_tell_towers_apart() -> None:
    towers = {**under("vision.", dict.fromkeys(BODY, (8, 8))), **under("text.", BODY)}
    assert find_prefix(BODY, towers, "x") == Prefix("", "text.")


def test_two_equal_towers_are_refused_and_not_guessed() -> None:
    with pytest.raises(
        RetexError, match=r"clip: the base matches two parts of it equally well, 'query\.' and 'text\.'"
    ):
        find_prefix(BODY, {**under("text.", BODY), **under("query.", BODY)}, "clip")


def test_names_decide_where_no_shape_agrees() -> None:
    other = {name: (*shape, 1) for name, shape in under("bert.", BODY).items()}
    assert find_prefix(BODY, other, "x") == Prefix("", "bert.")


def test_nothing_in_common_is_no_prefix() -> None:
    assert find_prefix(BODY, {"conv.weight": (3, 3)}, "x") == Prefix("", "")


def test_old_layer_norm_names_are_today_s() -> None:
    assert canonical("bert.LayerNorm.gamma") == "bert.LayerNorm.weight"
    assert canonical("bert.LayerNorm.beta") == "bert.LayerNorm.bias"
    assert canonical("layer.gamma") == "layer.gamma"
    assert strip("bert.x.LayerNorm.beta", "bert.") == "x.LayerNorm.bias"


@pytest.mark.parametrize(
    "name",
    [
        "classifier.weight",
        "bert.classifier.bias",
        "classifier.1.weight",
        "heads.0.weight",
        "classifier.out_proj.weight",
        "_fc.bias",
        "qa_outputs.weight",
        "score.weight",
        "model.head.fc.weight",
    ],
)
def test_output_layers_are_known_by_their_module(name: str) -> None:
    assert is_output_module(name)


@pytest.mark.parametrize(
    "name", ["weight", "encoder.layer.3.fc.weight", "blocks.0.head.weight", "attention.out_proj.weight", "dense.weight"]
)
def test_modules_inside_layers_are_no_output_layers(name: str) -> None:
    assert not is_output_module(name)


def test_vocabulary_tables_are_known_by_their_module() -> None:
    assert is_vocabulary("bert.embeddings.word_embeddings.weight")
    assert is_vocabulary("model.embed_tokens.weight")
    assert is_vocabulary("cls.predictions.bias")
    assert not is_vocabulary("embeddings.position_embeddings.weight")
    assert not is_vocabulary("layers.0.shared.weight")


def test_buffers_are_known_by_type_name_or_shape() -> None:
    assert is_buffer("embeddings.position_ids", (1, 9), floating=False)
    assert is_buffer("rotary.inv_freq", (8,), floating=True)
    assert is_buffer("h.0.attn.bias", (1, 1, 8, 8), floating=True)
    assert not is_buffer("h.0.mlp.bias", (8,), floating=True)
    assert not is_buffer("bn.running_mean", (8,), floating=True)
