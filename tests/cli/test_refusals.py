"""Refuse rather than guess: every case is typed and read: one line, a hint, the exit status, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

CARS = "experts/cars/model.safetensors"
QUERY = "bert.encoder.layer.0.attention.self.query.weight"


def change(file: str, edit: Callable[[Tensors], object]) -> None:
    """Rewrite a weight file with its tensors edited."""
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def change_metadata(file: str, key: str, value: str) -> None:
    with safe_open(file, "pt") as opened:
        metadata = {**(opened.metadata() or {}), key: value}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    save_file(tensors, file, metadata=metadata)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def refused(retex):
    """Type a command that must be refused: nothing may be written, and the two lines must hold ``words``."""

    def check(*arguments: str, words: tuple[str, ...], code: int = 1, hint: bool = True) -> None:
        before = files_in(Path.cwd())
        result = retex(*arguments)
        assert result.code == code, result.err + result.out
        assert result.out == ""
        lines = [line for line in result.err.splitlines() if line.startswith(("error: ", "hint: "))]
        assert [line.split(":")[0] for line in lines] == ["error", "hint"][: 1 + hint], result.err
        assert "Traceback" not in result.err
        for word in words:
            assert word in " ".join(lines)
        assert files_in(Path.cwd()) == before, "a refusal writes nothing"

    return check


def test_what_is_refused_below_works_as_it_is(workspace: Path, retex) -> None:
    assert retex("merge").code == 0


def test_another_base(workspace: Path, refused) -> None:
    def reroll(tensors: Tensors) -> None:
        generator = torch.Generator().manual_seed(9)
        tensors.update({name: torch.randn(t.shape, generator=generator) * 0.15 for name, t in tensors.items()})

    change("base/model.safetensors", reroll)
    refused("merge", words=("cars", "base", "not tuned from", "norm"))


def test_another_base_can_be_let_through_and_is_recorded(workspace: Path, retex) -> None:
    change("base/model.safetensors", lambda t: t.update({name: torch.full_like(v, 0.5) for name, v in t.items()}))
    assert retex("merge", "--allow-unrelated").code == 0
    recipe = retex("inspect", "merged", "--json").json["recipe"]
    assert recipe["allow_unrelated"] is True


def test_a_shape_conflict(workspace: Path, refused) -> None:
    change(CARS, lambda t: t.update({QUERY: torch.zeros(48, 32)}))
    refused("merge", words=(QUERY, "experts/cars", "48", "32"))


def test_a_missing_base_parameter(workspace: Path, refused, retex) -> None:
    change(CARS, lambda t: t.pop(QUERY))
    refused("merge", words=(QUERY.removeprefix("bert."), "experts/cars", "--allow-missing"))
    assert retex("merge", "--allow-missing", "*.query.weight").code == 0
    assert retex("inspect", "merged", "--json").json["recipe"]["allow_missing"] == ["*.query.weight"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_or_infinity(workspace: Path, refused, value: float) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[QUERY][3, 4] = value

    change(CARS, spoil)
    refused("merge", words=(QUERY, "experts/cars", str(value)))


def header(file: Path) -> tuple[dict[str, dict[str, list[int]]], bytes]:
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(file: Path, entries: dict[str, dict[str, list[int]]], data: bytes) -> None:
    text = json.dumps(entries).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_a_truncated_file(workspace: Path, refused) -> None:
    file = Path(CARS)
    file.write_bytes(file.read_bytes()[:-100])
    refused("merge", words=(CARS,))


def test_an_oversized_header(workspace: Path, refused) -> None:
    file = Path(CARS)
    file.write_bytes(struct.pack("<Q", 1 << 40) + file.read_bytes()[8:])
    refused("merge", words=(CARS, "oversized", f"{1 << 40:,}"))


def test_overlapping_tensors(workspace: Path, refused) -> None:
    file = Path(CARS)
    entries, data = header(file)
    other = QUERY.replace("query", "key")
    entries[QUERY]["data_offsets"] = entries[other]["data_offsets"]
    write_header(file, entries, data)
    refused("merge", words=(CARS, "overlap"))


def test_no_safetensors_at_all(workspace: Path, refused) -> None:
    Path(CARS).write_bytes(b"not one")
    refused("merge", words=(CARS,))


def test_offsets_of_another_merged_checkpoint(made: Path, refused, retex) -> None:
    assert retex("merge", "--method", "task_arithmetic", "--overwrite").code == 0
    refused("recover", "--task", "cars", words=("offsets.safetensors", "another merged checkpoint"))


def test_signatures_of_another_merged_checkpoint(made: Path, refused, retex) -> None:
    assert retex("merge", "--method", "task_arithmetic", "--overwrite").code == 0
    refused("identify", "data/cars-inputs.jsonl", words=("signatures.safetensors", "merged"))


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("offsets.safetensors", ("recover", "--task", "cars")),
        ("signatures.safetensors", ("identify", "data/cars-inputs.jsonl")),
    ],
)
def test_an_unknown_format_version(made: Path, refused, file: str, command: tuple[str, ...]) -> None:
    change_metadata(file, "format_version", "99")
    refused(*command, words=(file, "99", "version"))


def test_another_kind_of_file(made: Path, refused) -> None:
    refused("recover", "--task", "cars", "--offsets", "signatures.safetensors", words=("signatures.safetensors",))


def test_an_unknown_task(made: Path, refused) -> None:
    refused("recover", "--task", "cras", words=("cras", "cars"), code=2)
    refused("recover", "--mix", "cars=0.5,dt=0.5", words=("'dt'", "dtd"), code=2)


def test_shares_that_do_not_sum_to_one(made: Path, refused) -> None:
    refused("recover", "--mix", "cars=0.7,dtd=0.7", words=("the mix", "1.4"), code=2)


def test_inputs_that_are_empty_or_cannot_be_read(workspace: Path, refused, retex) -> None:
    assert retex("merge").code == 0
    inputs = Path("data/cars-inputs.jsonl")
    for text, words in (
        ("", ("no inputs",)),
        ('{"text": "a"}\n{"text": \n', ("2",)),
        ('{"words": "a"}\n' * 40, ("text",)),
        ('{"text": "a"}\n' * 3, ("3", "32")),
    ):
        inputs.write_text(text)
        refused("build-signatures", words=(str(inputs), *words))
    inputs.unlink()
    refused("build-signatures", words=(str(inputs), "no such file"), hint=False)


def test_labels_outside_the_head(made: Path, refused) -> None:
    tests = Path("data/cars-test.jsonl")
    tests.write_text(tests.read_text() + '{"text": "a car", "label": "purple"}\n')
    refused("eval", words=(str(tests), "purple", "cars", "fast", "slow"))


def test_a_budget_that_holds_nothing(workspace: Path, refused, retex) -> None:
    assert retex("merge").code == 0
    refused("fit-offsets", "--budget", "2", words=("cars", "2", "--budget"))


def test_too_little_space(workspace: Path, refused, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 0))
    refused("merge", words=("merged", "space"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_at_the_end_of_a_pipe(workspace: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "retex_cli", "merge", "-o", "-"], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 1
    lines = done.stderr.decode().splitlines()
    assert "Traceback" not in done.stderr.decode()
    assert any(line.startswith("error: ") and ("full" in line or "space" in line) for line in lines)


def test_an_output_that_exists(made: Path, refused, retex) -> None:
    for command in ("merge", "fit-offsets", "build-signatures"):
        refused(command, words=("already exists", "--overwrite"))
    refused("recover", "--task", "cars", "-o", "offsets.safetensors", "--overwrite", words=("offsets.safetensors",))
    assert retex("merge", "--overwrite", "-q").code == 0


def test_an_output_that_is_an_input(made: Path, refused) -> None:
    refused("merge", "-o", "experts/cars", "--overwrite", words=("experts/cars", "input"))
    refused("recover", "--task", "cars", "-o", "merged", "--overwrite", words=("merged", "input"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--method", "tise"), ("tise", "ties")),
        (("--method", "ties", "--set", "densty=0.5"), ("ties", "densty", "density")),
        (("--method", "average", "--density", "0.5"), ("average", "density")),
        (("--method", "ties", "--density", "5"), ("density", "5", "between")),
        (("--method", "ties", "--set", "nothing.*:density=1"), ("nothing.*",)),
        (("--dtype", "float31"), ("float31",)),
        (("--max-memory", "10"), ("--max-memory",)),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_a_method_does_not_take(
    workspace: Path, refused, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    refused("merge", *arguments, words=words, code=2)


def test_an_unknown_option_in_the_file_names_the_file(workspace: Path, refused) -> None:
    Path("retex.toml").write_text('[merge]\nmethod = "ties"\ndensty = 0.5\n' + Path("retex.toml").read_text())
    refused("merge", words=("retex.toml", "densty", "density"), code=2)


def test_nothing_there(workspace: Path, refused) -> None:
    refused("fit-offsets", words=("merged",))
    refused("inspect", "nothing.safetensors", words=("nothing.safetensors",))


def test_no_permission(workspace: Path, refused) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    Path(CARS).chmod(0)
    refused("merge", words=(CARS,))
