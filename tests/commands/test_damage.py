"""A damaged offsets file: what comes back is what was stored or a refusal that says which task is hurt."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import retex_cli
from retex_cli import RetexError
from retex_cli.commands.offsets_file import OffsetsFile
from retex_cli.commands.recover import tensors_of
from retex_cli.io.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from tests.conftest import Retex

FILE = "offsets.safetensors"


def everything(path: Path, merged: Checkpoint) -> dict[str, dict[str, Tensor] | str]:
    """Every task's tensors, or why it is refused; a file that is refused as a whole has none."""
    try:
        file = OffsetsFile(str(path), merged)
        file.check_merged({name: _digest(merged, name) for name in merged.tensors})
    except RetexError as error:
        return {"": error.message}
    found: dict[str, dict[str, Tensor] | str] = {}
    for task in ("cars", "dtd"):
        try:
            tensors = dict(tensors_of(file, task, file.predictor([task])))
            found[task] = tensors
            file.side_files(task)
        except RetexError as error:
            found[task] = error.message
    file.close()
    return found


_DIGESTS: dict[str, bytes] = {}


def _digest(merged: Checkpoint, name: str) -> bytes:
    from retex_cli.io.provenance import tensor_digest

    if name not in _DIGESTS:
        _DIGESTS[name] = tensor_digest(merged.read(name))
    return _DIGESTS[name]


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]) for name in expected
    )


@pytest.fixture(scope="module")
def whole(tiny_artefacts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, Checkpoint, int]:
    """A copy to write to, the file's bytes, its merged checkpoint, and where its data begins. ``dtd`` is lossless."""
    folder = tmp_path_factory.mktemp("hurt")
    merged, path = str(tiny_artefacts / "merged"), folder / FILE
    experts = {task: str(tiny_artefacts / f"experts/{task}") for task in ("cars", "dtd")}
    retex_cli.fit_offsets(merged, {"cars": experts["cars"]}, str(path), budget="5%", device="cpu")
    retex_cli.fit_offsets(merged, {}, str(path), add={"dtd": experts["dtd"]}, lossless=True, device="cpu")
    data = path.read_bytes()
    return path, data, open_checkpoint(merged), 8 + struct.unpack("<Q", data[:8])[0]


PLACES = st.tuples(st.sampled_from(["header", "data"]), st.integers(0, 2**20))
FLIPS = st.lists(st.tuples(PLACES, st.integers(0, 7)), min_size=1, max_size=3)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=FLIPS, cut=st.one_of(st.none(), st.floats(0, 0.999)))
def test_nothing_comes_back_wrong(
    whole: tuple[Path, bytes, Checkpoint, int], flips: list[tuple[tuple[str, int], int]], cut: float | None
) -> None:
    path, data, merged, start = whole
    path.write_bytes(data)
    expected = everything(path, merged)
    damaged = bytearray(data)
    for (place, at), bit in flips:
        damaged[at % start if place == "header" else start + at % (len(data) - start)] ^= 1 << bit
    path.write_bytes(damaged if cut is None else damaged[: int(cut * len(damaged))])
    for task, found in everything(path, merged).items():
        if isinstance(found, str):
            assert found.startswith(str(path)), "a refusal names the file"
        else:
            good = expected[task]
            assert isinstance(good, dict)
            assert same(found, good)


def rewritten(change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> None:
    """Change tensors and metadata of the file."""
    with safe_open(FILE, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(FILE)
    change(tensors, metadata)
    save_file(tensors, FILE, metadata=metadata)


def flip_head(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    del metadata
    tensors["tensors/cars/classifier.weight"].view(torch.uint8).view(-1)[3] ^= 1


def lose_head(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    del metadata, tensors["tensors/cars/classifier.weight"]


def reshape_head(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    del metadata
    tensors["tensors/cars/classifier.weight"] = tensors["tensors/cars/classifier.weight"].reshape(-1)


def flip_offsets(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    del metadata
    tensors["offsets/cars"][20] ^= 4


def lose_offsets(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    del metadata, tensors["offsets/cars"]


def flip_file(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    digest = json.loads(metadata["tasks"])["cars"]["files"]["config.json"]
    tensors[f"files/{digest}"][1] ^= 1


def change_record(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    del tensors
    metadata["tasks"] = metadata["tasks"].replace('"dtype":"F32"', '"dtype":"F16"', 1)


def lose_key(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    del tensors
    metadata["tasks"] = metadata["tasks"].replace('"prefix"', '"prefjx"', 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (flip_head, "tensor 'tensors/cars/classifier.weight' has another digest"),
        (lose_head, "tensor 'tensors/cars/classifier.weight' is not there"),
        (reshape_head, "tensor 'tensors/cars/classifier.weight' has another digest"),
        (flip_offsets, "the offsets of task 'cars' are damaged: its SHA-256"),
        (lose_offsets, "the offsets of task 'cars' are damaged: they are not there"),
        (flip_file, "its file config.json has another SHA-256"),
        (change_record, "in the header: its entry has another digest"),
        (lose_key, "in the header"),
    ],
)
def test_the_hurt_task_is_named_and_the_other_comes_back(
    made: Path, retex: Retex, change: Callable[[dict[str, Tensor], dict[str, str]], None], words: str
) -> None:
    assert retex("recover", "--task", "dtd", "-o", "before/").code == 0
    rewritten(change)
    result = retex("recover", "--task", "cars", "-o", "cars/")
    assert result.code == 1
    assert words in result.err
    assert "'cars'" in result.err
    assert "get the file again for this one" in result.err
    assert not Path("cars").exists()
    assert retex("recover", "--task", "dtd", "-o", "after/").code == 0
    assert Path("after/model.safetensors").read_bytes() == Path("before/model.safetensors").read_bytes()


def test_a_damaged_task_is_not_passed_on_as_whole(made: Path, retex: Retex) -> None:
    rewritten(flip_head)
    assert retex("fit-offsets", "--add", "pets=experts/dtd", "--budget", "5%").code == 0
    assert "has another digest" in retex("recover", "--task", "cars", "-o", "cars/").err
    assert retex("recover", "--task", "pets", "-o", "pets/").code == 0
    rewritten(change_record)
    result = retex("fit-offsets", "--add", "more=experts/dtd", "--budget", "5%")
    assert result.code == 1
    assert "task 'cars' is damaged" in result.err
    assert retex("fit-offsets", "--remove", "cars").code == 0
    assert retex("recover", "--task", "dtd", "-o", "dtd/").code == 0


def test_a_file_without_digests_is_read_as_before(made: Path, retex: Retex) -> None:
    rewritten(lambda _, metadata: metadata.pop("checks"))  # type: ignore[arg-type, return-value]
    assert retex("recover", "--task", "cars", "-o", "cars/").code == 0
    assert retex("fit-offsets", "--remove", "dtd").code == 0
    with safe_open(FILE, "pt") as file:
        assert {"cars", "tensors/cars/classifier.weight"} <= json.loads(file.metadata()["checks"]).keys()
