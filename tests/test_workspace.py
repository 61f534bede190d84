from __future__ import annotations

from pathlib import Path

import pytest

from retex_cli.errors import UsageError
from retex_cli.workspace import Workspace, check_task_name

FULL = """
[model]
base = "org/base@v1"
model = "package.module:function"
[merge]
method = "ties"
density = 0.2
max_shard_size = "1GB"
allow_missing = ["*.bias"]
[merge.override."*.bias"]
density = 1.0
[offsets]
budget = "80KB"
[signatures]
preset = "sim"
samples = 64
max_length = 48
[eval]
batch_size = 8
protocols = ["K"]
[tasks.dtd]
expert = "org/dtd"
[tasks.cars]
expert = "experts/cars"
inputs = "data/cars.jsonl"
test = "/data/cars-test.jsonl"
validation = "data/cars-validation.jsonl"
"""


def write(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "retex.toml").write_text(text, encoding="utf-8")
    return folder


def refused(tmp_path: Path, text: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        Workspace.load(write(tmp_path, text))
    assert str(tmp_path / "retex.toml") in caught.value.message
    assert "\n" not in caught.value.message
    return caught.value


def test_every_key_is_read_and_paths_are_beside_the_file(tmp_path: Path) -> None:
    space = Workspace.load(write(tmp_path, FULL))
    assert (space.base, space.model) == ("org/base@v1", "package.module:function")
    assert (space.merge.method, space.merge.max_shard_size, space.merge.allow_missing) == ("ties", "1GB", ("*.bias",))
    assert space.merge.options == {"density": 0.2}
    assert space.merge.overrides == {"*.bias": {"density": 1.0}}
    assert space.offsets.budget == "80KB"
    assert (space.signatures.preset, space.signatures.samples, space.signatures.max_length) == ("sim", 64, 48)
    assert (space.eval.batch_size, space.eval.protocols) == (8, ("K",))
    assert list(space.tasks) == ["cars", "dtd"]
    assert space.tasks["cars"].inputs == str(tmp_path / "data/cars.jsonl")
    assert space.tasks["cars"].test == "/data/cars-test.jsonl"
    assert space.tasks["cars"].validation == str(tmp_path / "data/cars-validation.jsonl")
    assert space.path("merged") == str(tmp_path / "merged")


def test_an_empty_file_is_a_workspace_that_says_nothing(tmp_path: Path) -> None:
    space = Workspace.load(write(tmp_path, ""))
    assert space == Workspace(folder=tmp_path, file=tmp_path / "retex.toml")


@pytest.mark.parametrize("reference", ["org/name", "org/name@v1.0", "org/na-me_1.5@0a1b2c", "a-b/c@refs/pr/1"])
def test_a_hub_id_stays_as_it_is(tmp_path: Path, reference: str) -> None:
    assert Workspace.load(write(tmp_path, f'model = {{base = "{reference}"}}')).base == reference


@pytest.mark.parametrize("reference", ["base", "./org/name", "a/b/c", "org/name.safetensors", "org/name/", "../up"])
def test_anything_else_is_a_path_beside_the_file(tmp_path: Path, reference: str) -> None:
    assert Workspace.load(write(tmp_path, f'model = {{base = "{reference}"}}')).base == str(tmp_path / reference)


def test_a_folder_that_is_there_wins_over_a_hub_id(tmp_path: Path) -> None:
    (tmp_path / "experts/cars").mkdir(parents=True)
    assert Workspace.load(write(tmp_path, FULL)).tasks["cars"].expert == str(tmp_path / "experts/cars")


def test_a_missing_path_is_not_taken_from_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here/experts/cars").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    space = Workspace.load(write(tmp_path / "there", FULL))
    assert space.tasks["cars"].expert == str(tmp_path / "there/experts/cars")


def test_paths_stay_relative_in_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "experts/cars").mkdir(parents=True)
    monkeypatch.chdir(write(tmp_path, FULL))
    space = Workspace.load()
    assert (space.tasks["cars"].expert, space.path("merged")) == ("experts/cars", "merged")


def test_no_file_here_is_a_workspace_of_flags_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space = Workspace.load()
    assert space.file is None
    assert space.with_experts({"b": "y", "a": "x"}) == {"a": "x", "b": "y"}
    assert list(space.with_experts({"b": "y", "a": "x"})) == ["a", "b"]


def test_no_file_in_a_named_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not a workspace") as caught:
        Workspace.load(tmp_path)
    assert caught.value.hint is not None
    assert "retex init" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "key", "near"),
    [
        ("[modle]", "modle", "model"),
        ("[model]\nbsae = 'x'", "model.bsae", "base"),
        ("[offsets]\nbuget = '1%'", "offsets.buget", "budget"),
        ("[signatures]\nsample = 3", "signatures.sample", "samples"),
        ("[eval]\nbatchsize = 3", "eval.batchsize", "batch_size"),
        ("[tasks.cars]\nexprt = 'x'", "tasks.cars.exprt", "expert"),
    ],
)
def test_an_unknown_key_names_itself_and_the_closest(tmp_path: Path, text: str, key: str, near: str) -> None:
    error = refused(tmp_path, text)
    assert f"unknown key {key}" in error.message
    assert near in str(error.hint)


def test_an_unknown_key_like_nothing_lists_the_known_ones(tmp_path: Path) -> None:
    assert refused(tmp_path, "[tasks.cars]\nzzz = 1").hint == "known: expert, inputs, test, validation"


def test_an_option_may_differ_between_tasks(tmp_path: Path) -> None:
    (tmp_path / "retex.toml").write_text("[merge]\nmethod = 'ties'\n[merge.weight]\ncars = 1.5\n'*' = 1\n")
    assert Workspace.load(tmp_path).merge.options == {"weight": {"cars": 1.5, "*": 1}}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("model = 3", "model"),
        ("[model]\nbase = 3", "model.base"),
        ("[model]\nbase = ''", "model.base"),
        ("[model]\nmodel = 'nothing'", "model.model"),
        ("[merge]\nmethod = ['ties']", "merge.method"),
        ("[merge]\nmax_shard_size = true", "merge.max_shard_size"),
        ("[merge]\nallow_missing = '*'", "merge.allow_missing"),
        ("[merge]\ndensity = {}", "merge.density"),
        ("[merge]\ndensity = {a = 'much'}", "merge.density"),
        ("[merge]\noverride = 1", "merge.override"),
        ("[merge.override]\n'*.bias' = 1", "merge.override"),
        ("[offsets]\nbudget = 0.25", "offsets.budget"),
        ("[signatures]\nsamples = 0", "signatures.samples"),
        ("[signatures]\nsamples = true", "signatures.samples"),
        ("[eval]\nbatch_size = '8'", "eval.batch_size"),
        ("[eval]\nprotocols = ['X']", "eval.protocols"),
        ("[tasks]\ncars = 'experts/cars'", "tasks.cars"),
        ("[tasks.cars]\nexpert = 1", "tasks.cars.expert"),
        ("[tasks.cars]\ntest = []", "tasks.cars.test"),
    ],
)
def test_a_value_of_the_wrong_kind_names_key_and_value(tmp_path: Path, text: str, key: str) -> None:
    assert f": {key}" in refused(tmp_path, text).message


def test_a_file_that_is_no_toml_says_where(tmp_path: Path) -> None:
    assert "line 2" in refused(tmp_path, "[model]\nbase = \n").message


@pytest.mark.parametrize("name", ["auto", "a b", "../up", "", ".hidden", "a/b", "-x", "a=b"])
def test_a_name_that_cannot_name_a_task_is_refused(tmp_path: Path, name: str) -> None:
    refused(tmp_path, f'[tasks."{name}"]\nexpert = "x"')
    with pytest.raises(UsageError, match="--expert"):
        check_task_name(name, "--expert")


def test_flags_beat_the_file_task_by_task(tmp_path: Path) -> None:
    space = Workspace.load(write(tmp_path, FULL))
    assert space.need_base(None) == "org/base@v1"
    assert space.need_base("flag") == "flag"
    experts = space.with_experts({"cars": "other", "new": "one"})
    assert experts == {"cars": "other", "dtd": "org/dtd", "new": "one"}


def test_what_is_missing_names_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no task is given") as caught:
        Workspace.load().with_experts({})
    assert "retex init" in str(caught.value.hint)
    with pytest.raises(UsageError, match="no base model"):
        Workspace.load().need_base(None)

    empty = Workspace.load(write(tmp_path / "empty", ""))
    with pytest.raises(UsageError, match=r"retex\.toml has no task"):
        empty.with_inputs({})

    partial = Workspace.load(write(tmp_path / "partial", "[tasks.cars]\nexpert = 'x'"))
    with pytest.raises(UsageError, match=r"no task in .*retex\.toml has `test`"):
        partial.with_tests({})
