from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from retex_cli.errors import RetexError
from retex_cli.io.align import Alignment, align, expert_name
from retex_cli.io.checkpoint import open_checkpoint

MakeModel = Callable[..., Path]
Tensors = dict[str, torch.Tensor]


def encoder(prefix: str = "", vocabulary: int = 10, fill: float = 0.0) -> Tensors:
    return {
        f"{prefix}embeddings.word_embeddings.weight": torch.full((vocabulary, 4), fill),
        f"{prefix}embeddings.position_embeddings.weight": torch.full((6, 4), fill),
        f"{prefix}encoder.layer.0.dense.weight": torch.full((4, 4), fill),
        f"{prefix}encoder.layer.0.LayerNorm.weight": torch.full((4,), fill),
    }


def head(classes: int) -> Tensors:
    return {"classifier.weight": torch.ones(classes, 4), "classifier.bias": torch.ones(classes)}


class Pair:
    """Writes two checkpoints and aligns them."""

    def __init__(self, make_model: MakeModel) -> None:
        self.make = make_model
        self.count = 0

    def __call__(
        self,
        base: Tensors,
        expert: Tensors,
        configs: tuple[object, object] = (None, None),
        files: tuple[str, str] = ("model.safetensors", "model.safetensors"),
        allow: tuple[str, ...] = (),
    ) -> Alignment:
        self.count += 1
        folders = [
            self.make(f"{self.count}/{name}", tensors, config, file)
            for name, tensors, config, file in zip(("base", "expert"), (base, expert), configs, files, strict=True)
        ]
        first, second = map(open_checkpoint, folders)
        found = align(first, second, allow_missing=allow)
        accounted = [*found.shared.values(), *found.task]
        assert sorted(set(accounted)) == sorted(second.tensors)
        assert sorted([*found.shared, *found.kept]) == sorted(first.tensors)
        return found


@pytest.fixture
def pair(make_model: MakeModel) -> Pair:
    return Pair(make_model)


def test_a_bare_encoder_and_its_prefixed_classifier(pair: Pair) -> None:
    base = {**encoder(), "embeddings.position_ids": torch.arange(6)}
    found = pair(base, {**encoder("bert."), **head(3)})
    assert found.prefix == ("", "bert.")
    assert found.shared == {name: f"bert.{name}" for name in encoder()}
    assert found.kept == ("embeddings.position_ids",)
    assert set(found.task) == set(head(3))
    assert found.rows == {}
    assert expert_name(found, "encoder.layer.0.dense.weight") == "bert.encoder.layer.0.dense.weight"
    assert expert_name(found, "embeddings.position_ids") == "bert.embeddings.position_ids"


def test_a_prefixed_base_and_a_bare_expert(pair: Pair) -> None:
    found = pair(encoder("bert."), encoder())
    assert found.shared == {f"bert.{name}": name for name in encoder()}
    assert found.prefix == ("bert.", "")


def test_shared_names_come_in_the_order_of_the_base_file(pair: Pair) -> None:
    found = pair(encoder(), encoder())
    assert list(found.shared) == sorted(encoder())  # the order in which the library lays them out


def test_tensorflow_names_of_layer_norms_match(pair: Pair) -> None:
    base = encoder()
    base["encoder.layer.0.LayerNorm.gamma"] = base.pop("encoder.layer.0.LayerNorm.weight")
    found = pair(base, encoder("bert."))
    assert found.shared["encoder.layer.0.LayerNorm.gamma"] == "bert.encoder.layer.0.LayerNorm.weight"


def test_an_output_layer_of_another_size_is_the_task_s_and_one_of_the_same_size_is_merged(pair: Pair) -> None:
    found = pair({**encoder(), **head(2)}, {**encoder(), **head(5)})
    assert set(found.task) == set(found.kept) == set(head(2))
    assert set(head(2)) <= set(pair({**encoder(), **head(2)}, {**encoder(), **head(2)}).shared)


def test_an_output_layer_of_any_name_is_known_from_the_label_counts(pair: Pair) -> None:
    base, expert = {**encoder(), "answer.weight": torch.ones(2, 4)}, {**encoder(), "answer.weight": torch.ones(7, 4)}
    labels = {"id2label": {str(k): str(k) for k in range(7)}}
    assert pair(base, expert, ({}, labels)).task == ("answer.weight",)
    with pytest.raises(RetexError, match=r"'answer\.weight' has the shape \[7, 4\]"):
        pair(base, expert)


def test_grown_vocabulary_shares_its_common_rows(pair: Pair) -> None:
    table = "embeddings.word_embeddings.weight"
    found = pair(encoder(), encoder("bert.", vocabulary=13))
    assert found.rows == {table: 10}
    assert found.shared[table] == f"bert.{table}"
    assert found.task == ()


def test_grown_vocabulary_of_any_name_is_known_from_the_configs(pair: Pair) -> None:
    base, expert = {**encoder(), "lookup.weight": torch.ones(10, 3)}, {**encoder(), "lookup.weight": torch.ones(12, 3)}
    assert pair(base, expert, ({"vocab_size": 10}, {"vocab_size": 12})).rows == {"lookup.weight": 10}
    nested = ({"text_config": {"vocab_size": 10}}, {"text_config": {"vocab_size": 12}})
    assert pair(base, expert, nested).rows == {"lookup.weight": 10}
    with pytest.raises(RetexError, match=r"lookup\.weight"):
        pair(base, expert)


def test_a_shrunken_vocabulary_is_refused_with_both_counts(pair: Pair) -> None:
    with pytest.raises(
        RetexError, match=r"expert/model\.safetensors: tensor .* has 8 vocabulary rows, fewer than the 10"
    ):
        pair(encoder(), encoder(vocabulary=8))


def test_more_positions_are_no_vocabulary(pair: Pair) -> None:
    longer = encoder()
    longer["embeddings.position_embeddings.weight"] = torch.zeros(9, 4)
    with pytest.raises(RetexError) as caught:
        pair(encoder(), longer)
    message = caught.value.message
    assert "'embeddings.position_embeddings.weight' has the shape [9, 4]" in message
    assert "has [6, 4]" in message
    assert "expert/model.safetensors" in message
    assert "base/model.safetensors" in message
    assert caught.value.hint


def test_another_width_under_a_prefix_is_a_conflict_of_shapes(pair: Pair) -> None:
    wide = {f"bert.{name}": torch.zeros(*(2 * size for size in t.shape)) for name, t in encoder().items()}
    with pytest.raises(RetexError, match=r"has the shape \[8, 8\].*has \[4, 4\]"):
        pair({"encoder.layer.0.dense.weight": torch.zeros(4, 4)}, wide)


def test_a_missing_parameter_is_refused_unless_it_may_be_missing(pair: Pair) -> None:
    short = {name: t for name, t in encoder("bert.").items() if "LayerNorm" not in name}
    with pytest.raises(RetexError) as caught:
        pair(encoder(), short)
    assert "expert/model.safetensors: tensor 'encoder.layer.0.LayerNorm.weight' is missing" in caught.value.message
    assert "the shape [4]" in caught.value.message
    assert caught.value.hint is not None
    assert "--allow-missing 'encoder.layer.0.LayerNorm.weight'" in caught.value.hint
    found = pair(encoder(), short, allow=("*LayerNorm*",))
    assert found.kept == ("encoder.layer.0.LayerNorm.weight",)


def test_a_pretraining_head_that_experts_lack_needs_one_glob(pair: Pair) -> None:
    pretraining = {"cls.predictions.bias": torch.ones(10), "cls.predictions.dense.weight": torch.ones(4, 4)}
    with pytest.raises(RetexError) as caught:
        pair({**encoder("bert."), **pretraining}, {**encoder("bert."), **head(2)})
    assert caught.value.hint is not None
    assert "--allow-missing 'cls.*'" in caught.value.hint
    found = pair({**encoder("bert."), **pretraining}, {**encoder("bert."), **head(2)}, allow=("cls.*",))
    assert set(found.kept) == set(pretraining)


def test_models_without_a_common_tensor_are_refused_as_such(pair: Pair) -> None:
    with pytest.raises(RetexError, match="shares no tensor with the base"):
        pair(encoder(), {"conv.weight": torch.zeros(3, 3)})


def test_integer_buffers_are_shared_only_when_equal(pair: Pair) -> None:
    base = {**encoder(), "ids": torch.arange(4), "mask": torch.ones(4, dtype=torch.bool)}
    same = pair(base, dict(base))
    assert {"ids", "mask"} <= set(same.shared)
    other = pair(base, {**base, "ids": torch.arange(4) + 1})
    assert other.task == ("ids",)
    assert other.kept == ("ids",)
    assert "mask" in other.shared
    longer = pair(base, {**base, "ids": torch.arange(9)})
    assert longer.task == longer.kept == ("ids",)


def test_float_buffers_may_be_missing_and_running_statistics_may_not(pair: Pair) -> None:
    base = {**encoder(), "rope.inv_freq": torch.ones(4), "attn.bias": torch.ones(1, 1, 4, 4)}
    assert set(pair(base, encoder()).kept) == {"rope.inv_freq", "attn.bias"}
    with pytest.raises(RetexError, match=r"bn\.running_mean"):
        pair({**encoder(), "bn.running_mean": torch.ones(4)}, encoder())


def test_element_types_may_differ_among_floats_and_quantised_weights_are_refused(pair: Pair) -> None:
    assert len(pair(encoder(), {name: t.bfloat16() for name, t in encoder().items()}).shared) == 4
    quantised = {**encoder(), "encoder.layer.0.dense.weight": torch.zeros(4, 4, dtype=torch.int8)}
    with pytest.raises(RetexError, match=r"is int8 \[4, 4\], in the base .* it is float32 \[4, 4\]"):
        pair(encoder(), quantised)


def test_tied_weights_match_whichever_name_a_file_kept(pair: Pair) -> None:
    table = torch.randn(10, 4)
    body = {"model.layers.0.w.weight": torch.ones(4, 4)}
    tied = {**body, "model.embed_tokens.weight": table, "lm_head.weight": table}
    by_head = {**body, "lm_head.weight": table + 1}
    found = pair(tied, by_head, files=("pytorch_model.bin", "model.safetensors"))
    assert found.shared["model.embed_tokens.weight"] == "lm_head.weight"
    both = pair({**body, "lm_head.weight": table}, tied, files=("model.safetensors", "pytorch_model.bin"))
    assert both.shared["lm_head.weight"] == "model.embed_tokens.weight"
    assert both.task == ()


def test_a_base_that_stores_both_copies_of_a_tied_table(pair: Pair) -> None:
    table = torch.randn(10, 4)
    twice = {"embed_tokens.weight": table, "lm_head.weight": table.clone(), "w.weight": torch.ones(2)}
    once = {"embed_tokens.weight": table + 1, "w.weight": torch.ones(2)}
    found = pair(twice, once, (None, {"tie_word_embeddings": True}))
    assert found.shared["lm_head.weight"] == found.shared["embed_tokens.weight"] == "embed_tokens.weight"
    with pytest.raises(RetexError, match=r"lm_head\.weight"):
        pair(twice, once, (None, {"tie_word_embeddings": False}))
    twice["lm_head.weight"] = table + 5
    with pytest.raises(RetexError, match=r"lm_head\.weight"):
        pair(twice, once, (None, {"tie_word_embeddings": True}))
