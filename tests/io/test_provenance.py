from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from retex_cli.io.checkpoint import open_checkpoint
from retex_cli.io.provenance import (
    TensorDigest,
    checkpoint_digests,
    checkpoint_fingerprint,
    fingerprint,
    tensor_digest,
)

W = {"a": torch.randn(3000, 500), "b": torch.ones(3).bfloat16(), "s": torch.tensor(1), "e": torch.empty(0)}


def test_a_tensor_s_hash_is_that_of_its_bytes_in_any_chunking() -> None:
    expected = hashlib.sha256(W["a"].numpy().tobytes()).digest()
    assert tensor_digest(W["a"]) == expected
    digest = TensorDigest()
    for start in range(0, W["a"].numel(), 99_999):
        digest.update(W["a"].flatten()[start : start + 99_999])
    assert digest.digest() == expected
    assert tensor_digest(W["a"].T) != expected


def test_the_fingerprint_depends_on_name_type_shape_and_data_alone(
    tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    with open_checkpoint(make_model("one", W)) as one:
        whole = checkpoint_fingerprint(one, threads=2)
        digests = checkpoint_digests(one)
    assert digests == {name: tensor_digest(W[name]) for name in digests}
    infos = {name: (tensor.dtype, tuple(tensor.shape), digests[name]) for name, tensor in W.items()}
    assert fingerprint(infos) == whole
    assert fingerprint(dict(reversed(infos.items()))) == whole

    sharded = tmp_path / "two"
    sharded.mkdir()
    save_file({"e": W["e"], "s": W["s"]}, sharded / "2.safetensors")
    save_file({"b": W["b"], "a": W["a"]}, sharded / "1.safetensors")
    mapping = ", ".join(f'"{name}": "{file}.safetensors"' for name, file in {"e": 2, "s": 2, "b": 1, "a": 1}.items())
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": {' + mapping + "}}")
    with open_checkpoint(sharded) as two:
        assert checkpoint_fingerprint(two) == whole

    changed = {
        "name": {("x" if name == "a" else name): info for name, info in infos.items()},
        "type": {**infos, "e": (torch.float16, (0,), digests["e"])},
        "shape": {**infos, "a": (torch.float32, (500, 3000), digests["a"])},
        "data": {**infos, "s": (torch.int64, (), tensor_digest(torch.tensor(2)))},
        "count": {name: info for name, info in infos.items() if name != "e"},
    }
    assert len({whole, *map(fingerprint, changed.values())}) == 6
