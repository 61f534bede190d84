"""What is typed reaches the command: every flag, every key of the file, every default, and the right one wins."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
from typer.main import get_command

import retex_cli
from retex_cli.cli.app import app
from retex_cli.errors import RetexError

MODULES = {
    "init": "init",
    "merge": "merge",
    "fit-offsets": "fit_offsets",
    "build-signatures": "build_signatures",
    "recover": "recover",
    "eval": "eval",
    "identify": "identify",
    "inspect": "inspect",
}
FUNCTIONS = {**MODULES, "eval": "evaluate"}
TOML = """
[model]
base = "org/base"
model = "nets:build"
[merge]
method = "ties"
density = 0.3
dtype = "float16"
max_shard_size = "1GB"
allow_missing = ["a"]
[merge.override."*.bias"]
density = 1.0
[offsets]
budget = "9KB"
[signatures]
preset = "sim"
samples = 40
max_length = 9
[eval]
batch_size = 5
protocols = ["K", "H"]
[tasks.cars]
expert = "org/cars"
inputs = "cars.jsonl"
test = "cars-test.jsonl"
[tasks.dtd]
expert = "org/dtd"
"""


class Stop(RetexError):
    """Raised in place of planning."""


@pytest.fixture
def config_of(retex, monkeypatch: pytest.MonkeyPatch):
    """The config that a command line builds, as a dictionary."""

    def build(*arguments: str) -> dict[str, object]:
        module = importlib.import_module(f"retex_cli.commands.{MODULES[arguments[0]]}")
        seen: list[object] = []

        def plan(config: object) -> None:
            seen.append(config)
            raise Stop("planned", "here")

        monkeypatch.setattr(module, "plan", plan)
        result = retex(*arguments)
        assert seen, result.err
        return {field.name: getattr(seen[0], field.name) for field in dataclasses.fields(seen[0])}  # type: ignore[arg-type]

    return build


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


EXPERTS = ("--expert", "cars=x", "--expert", "dtd=y")
SPELT = {"cars": "x", "dtd": "y"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (("merge", "--base", "b", *EXPERTS), {"base": "b", "experts": SPELT, "output": "merged", "method": "average"}),
        (("merge", "--base", "b", *EXPERTS, "-o", "x.safetensors"), {"output": "x.safetensors"}),
        (
            (
                "merge --base b --expert cars=x --method ties --scope tensor --density 0.5 --density cars=0.6"
                " --weight cars=2 --alpha auto --set k=3"
                " --set *.w:density=1 --dtype bfloat16 --max-shard-size 600MB --max-memory 1GiB --allow-missing p"
                " --allow-missing q --allow-unrelated --device cpu --threads 3 --seed 7 --overwrite"
            ).split(),
            {
                "method": "ties",
                "options": {
                    "scope": "tensor",
                    "density": {"*": 0.5, "cars": 0.6},
                    "weight": {"cars": 2},
                    "alpha": "auto",
                    "k": 3,
                },
                "overrides": {"*.w": {"density": 1}},
                "dtype": "bfloat16",
                "max_shard_size": 600_000_000,
                "max_memory": 1 << 30,
                "allow_missing": ("p", "q"),
                "allow_unrelated": True,
                "device": "cpu",
                "threads": 3,
                "seed": 7,
                "overwrite": True,
            },
        ),
        (
            ("fit-offsets", *EXPERTS),
            {"merged": "merged", "experts": SPELT, "output": "offsets.safetensors", "budget": None, "base": None},
        ),
        (
            "fit-offsets --expert cars=x --merged m --budget 1% --base b -o o.st --threads 2 --overwrite".split(),
            {"merged": "m", "budget": "1%", "base": "b", "output": "o.st", "threads": 2, "overwrite": True},
        ),
        (
            "build-signatures --inputs cars=x.csv".split(),
            {"merged": "merged", "inputs": {"cars": "x.csv"}, "output": "signatures.safetensors", "preset": "default"},
        ),
        (
            (
                "build-signatures --inputs cars=x --preset sim --base b --samples 33 --max-length 4"
                " --batch-size 2 --seed 1 --model a.b:c"
            ).split(),
            {
                "preset": "sim",
                "base": "b",
                "model": "a.b:c",
                "samples": 33,
                "or_fewer": False,
                "max_length": 4,
                "batch_size": 2,
                "seed": 1,
            },
        ),
        (
            "recover --task cars".split(),
            {
                "merged": "merged",
                "offsets": "offsets.safetensors",
                "signatures": None,
                "output": "recovered/cars",
                "task": "cars",
            },
        ),
        (
            "recover --mix cars=0.7,dtd=0.3 --head dtd --signatures s -o - --dtype fp16 --max-shard-size 1kb".split(),
            {
                "mix": {"cars": 0.7, "dtd": 0.3},
                "head": "dtd",
                "signatures": "s",
                "output": "-",
                "dtype": "fp16",
                "max_shard_size": 1000,
                "task": None,
            },
        ),
        ("recover --mix cars=1".split(), {"output": "recovered/mix"}),
        (
            "recover --input a.jpg --input b.jpg --soft --model a:b --min-confidence 0.9".split(),
            {
                "model": "a:b",
                "input": ("a.jpg", "b.jpg"),
                "soft": True,
                "min_confidence": 0.9,
                "output": "recovered/auto",
                "task": None,
            },
        ),
        ("recover --task auto --input a.jpg".split(), {"task": "auto", "output": "recovered/auto"}),
        (
            "eval --test cars=t --expert cars=x".split(),
            {
                "merged": "merged",
                "offsets": "offsets.safetensors",
                "signatures": None,
                "tests": {"cars": "t"},
                "experts": {"cars": "x"},
                "protocols": ("K",),
                "batch_size": 64,
                "fail_under": None,
                "output": None,
            },
        ),
        (
            "eval --test cars=t --expert cars=x --signatures s --fail-under 99 --logits l -o e.js --model a:b".split(),
            {
                "model": "a:b",
                "signatures": "s",
                "protocols": ("K", "E", "H"),
                "fail_under": "99",
                "logits": "l",
                "output": "e.js",
            },
        ),
        (
            "eval --test cars=t --expert cars=x --protocols E --base b --picture p.svg".split(),
            {"protocols": ("E",), "base": "b", "picture": "p.svg"},
        ),
        ("eval --test cars=t --expert cars=x --protocol K,E".split(), {"protocols": ("K", "E")}),
        (
            "identify a b --merged m --signatures s --device cpu --threads 1 --model a:b".split(),
            {"model": "a:b", "inputs": ("a", "b"), "merged": "m", "signatures": "s", "device": "cpu", "threads": 1},
        ),
        ("identify - --batch --batch-size 3".split(), {"inputs": ("-",), "batch": True, "batch_size": 3}),
        ("identify x".split(), {"batch": False, "batch_size": 64}),
        ("inspect x.safetensors".split(), {"path": "x.safetensors"}),
        ("inspect".split(), {"path": "merged"}),
        (
            ("init", "new", "--base", "b", *EXPERTS, "--overwrite"),
            {"folder": "new", "base": "b", "experts": SPELT, "overwrite": True},
        ),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, (list, tuple)) else "",
)
def test_flags_alone(here: Path, config_of, line: Sequence[str], expected: dict[str, object]) -> None:
    config = config_of(*line)
    assert {name: config[name] for name in expected} == expected


def in_file(folder: Path) -> dict[str, dict[str, object]]:
    """What TOML says, for every command."""
    at = str(folder) + "/" if str(folder) != "." else ""
    experts = {"cars": "org/cars", "dtd": "org/dtd"}
    artefacts = {"merged": f"{at}merged", "offsets": f"{at}offsets.safetensors"}
    return {
        "merge": {
            "base": "org/base",
            "experts": experts,
            "output": f"{at}merged",
            "method": "ties",
            "options": {"density": 0.3},
            "overrides": {"*.bias": {"density": 1.0}},
            "dtype": "float16",
            "max_shard_size": 10**9,
            "allow_missing": ("a",),
        },
        "fit-offsets": {
            "merged": f"{at}merged",
            "experts": experts,
            "output": f"{at}offsets.safetensors",
            "budget": "9KB",
            "base": "org/base",
        },
        "build-signatures": {
            "merged": f"{at}merged",
            "base": "org/base",
            "model": "nets:build",
            "inputs": {"cars": f"{at}cars.jsonl"},
            "output": f"{at}signatures.safetensors",
            "preset": "sim",
            "samples": 40,
            "or_fewer": True,
            "max_length": 9,
            "batch_size": 5,
        },
        "recover": {**artefacts, "model": "nets:build", "output": f"{at}recovered/cars", "task": "cars"},
        "eval": {
            **artefacts,
            "model": "nets:build",
            "experts": experts,
            "tests": {"cars": f"{at}cars-test.jsonl"},
            "protocols": ("K", "H"),
            "batch_size": 5,
        },
    }


@pytest.mark.parametrize("command", ["merge", "fit-offsets", "build-signatures", "recover", "eval"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_no_flag_at_all_in_a_workspace(here: Path, config_of, command: str, elsewhere: bool) -> None:
    folder = here / "there" if elsewhere else Path()
    folder.mkdir(exist_ok=True)
    (folder / "retex.toml").write_text(TOML)
    config = config_of(command, *(("--workspace", str(folder)) if elsewhere else ()))
    expected = in_file(folder)[command]
    assert {name: config[name] for name in expected} == expected


def test_flags_beat_the_file(here: Path, config_of) -> None:
    Path("retex.toml").write_text(TOML)
    merge = config_of(*"merge --base b --expert cars=x --density 0.9 --dtype float32 --max-shard-size 2GB -o m".split())
    assert (merge["base"], merge["experts"], merge["output"]) == ("b", {"cars": "x", "dtd": "org/dtd"}, "m")
    assert (merge["options"], merge["dtype"], merge["max_shard_size"]) == ({"density": 0.9}, "float32", 2 * 10**9)
    assert config_of("fit-offsets", "--budget", "1%")["budget"] == "1%"
    signatures = config_of(*"build-signatures --preset default --samples 50 --max-length 3 --batch-size 4".split())
    assert [signatures[key] for key in ("preset", "samples", "max_length", "batch_size")] == ["default", 50, 3, 4]
    assert config_of("eval", "--protocols", "K", "--batch-size", "4")["protocols"] == ("K",)
    assert config_of("eval", "--model", "other:build")["model"] == "other:build"


def test_a_module_beside_the_file_can_be_imported(here: Path, config_of, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (here / "there").mkdir()
    (here / "there/retex.toml").write_text("")
    config_of("identify", "x", "-w", "there")
    assert str(here / "there") not in sys.path, "nobody named a function"
    (here / "there/retex.toml").write_text(TOML)
    (here / "there/beside_the_file.py").write_text("")
    config_of("identify", "x", "-w", "there")
    assert importlib.util.find_spec("beside_the_file") is not None


def test_identify_and_inspect_know_the_artefacts_of_the_workspace(here: Path, config_of) -> None:
    (here / "there").mkdir()
    (here / "there/retex.toml").write_text("")
    config = config_of("identify", "x", "-w", "there")
    assert (config["merged"], config["signatures"]) == ("there/merged", "there/signatures.safetensors")
    assert config_of("inspect", "-w", "there")["path"] == "there/merged"


def test_recover_alone_brings_back_every_task_of_the_workspace(here: Path, retex, monkeypatch) -> None:
    module = importlib.import_module("retex_cli.commands.recover")
    seen: list[str] = []
    monkeypatch.setattr(module, "plan", lambda config: seen.append(config.output))
    Path("retex.toml").write_text(TOML)
    retex("recover")
    assert seen == ["recovered/cars", "recovered/dtd"]
    seen.clear()
    result = retex("recover", "-o", "one/")
    assert (result.code, seen) == (2, [])
    assert "2 tasks" in result.err


def fields(module: ModuleType) -> dict[str, dataclasses.Field[object]]:
    name = next(
        name for name in vars(module) if name.endswith("Config") and vars(module)[name].__module__ == module.__name__
    )
    return {field.name: field for field in dataclasses.fields(vars(module)[name])}


@pytest.mark.parametrize("command", MODULES)
def test_every_field_of_a_config_can_be_typed_and_called(command: str) -> None:
    """The command line, the function and the config use the same words and defaults."""
    module = importlib.import_module(f"retex_cli.commands.{MODULES[command]}")
    found = fields(module)
    function = inspect.signature(getattr(retex_cli, FUNCTIONS[command]))
    assert set(function.parameters) - {"progress"} == set(found)
    for name, parameter in function.parameters.items():
        if name == "progress" or parameter.default is parameter.empty:
            continue
        default = found[name].default
        if default is dataclasses.MISSING or default is None:
            assert parameter.default in (None, ()), name
        else:
            assert parameter.default == default, name
    typed = {
        re.sub(r"^--|^", "", option).replace("-", "_")
        for parameter in get_command(app).commands[command].params  # type: ignore[attr-defined]
        for option in (*parameter.opts, parameter.name)
    }
    same = {"experts": "expert", "tests": "test", "options": "set", "overrides": "set", "folder": "folder"}
    assert {same.get(name, name) for name in found} <= typed
