from __future__ import annotations

import json
import struct

import pytest
import torch

from retex_cli.io.layout import TensorSpec, encode_header, encode_index, is_aligned, plan_shards


def spec(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> TensorSpec:
    return TensorSpec(name, dtype, shape)


def test_sizes_of_specs() -> None:
    assert spec("s").numel == 1
    assert spec("e", 0, 3).nbytes == 0
    assert spec("w", 2, 3, dtype=torch.bfloat16).nbytes == 12


def test_a_header_is_exactly_these_bytes() -> None:
    header, starts = encode_header([spec("b", 2), spec("a", 1, 1)], {"by": "ä"})
    text = (
        '{"__metadata__":{"format":"pt","by":"ä"},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        '"a":{"dtype":"F32","shape":[1,1],"data_offsets":[8,12]}}'
    ).encode()
    text += b" " * (-len(text) % 8)
    assert header == struct.pack("<Q", len(text)) + text
    assert starts == {"b": 0, "a": 8}


def test_the_format_may_be_another_than_pt() -> None:
    header, _ = encode_header([], {"format": "retex.offsets"})
    assert json.loads(header[8:])["__metadata__"] == {"format": "retex.offsets"}


def test_odd_sizes_do_not_misalign_what_follows() -> None:
    specs = [spec("mask", 3, dtype=torch.bool), spec("w", 2), spec("ids", 1, dtype=torch.int64)]
    assert not is_aligned(specs)
    _, starts = encode_header(specs, {})
    assert starts == {"ids": 0, "w": 8, "mask": 16}


@pytest.mark.parametrize(
    ("limit", "files"),
    [
        (1000, {"model.safetensors": ["a", "b", "c", "d"]}),
        (24, {"model.safetensors": ["a", "b", "c", "d"]}),
        (23, {"model-00001-of-00002.safetensors": ["a", "b", "c"], "model-00002-of-00002.safetensors": ["d"]}),
        (
            8,
            {
                "model-00001-of-00003.safetensors": ["a"],
                "model-00002-of-00003.safetensors": ["b", "c"],
                "model-00003-of-00003.safetensors": ["d"],
            },
        ),
    ],
)
def test_shards_are_filled_in_order_and_a_large_tensor_is_alone(limit: int, files: dict[str, list[str]]) -> None:
    specs = [spec("a", 2), spec("b", 1), spec("c", 0), spec("d", 3)]
    shards = plan_shards(specs, {}, limit)
    assert {shard.file: list(shard.starts) for shard in shards} == files


def test_the_index_names_every_tensor_s_shard() -> None:
    specs = [spec("a", 2), spec("b", 3)]
    index = json.loads(encode_index(plan_shards(specs, {}, 12), specs))
    assert index == {
        "metadata": {"total_size": 20},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }


def test_a_name_cannot_be_written_twice() -> None:
    with pytest.raises(ValueError, match="same name"):
        plan_shards([spec("a"), spec("a")], {}, 100)
