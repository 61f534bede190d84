from __future__ import annotations

from pathlib import Path

import pytest

from retex_cli.commands.init import InitConfig, plan, run
from retex_cli.errors import RetexError
from retex_cli.progress import Silent
from retex_cli.workspace import Workspace


def test_the_plan_shows_the_text_and_writes_nothing(tmp_path: Path) -> None:
    planned = plan(InitConfig(folder=str(tmp_path), base="org/base"))
    assert list(tmp_path.iterdir()) == []
    report = planned.report()
    assert report.to_json() == {
        "file": str(tmp_path / "retex.toml"),
        "tasks": 0,
        "written": False,
        "text": planned.text,
    }
    assert 'base = "org/base"' in report.lines()


def test_what_is_written_is_a_workspace_with_what_was_given(tmp_path: Path) -> None:
    config = InitConfig(
        folder=str(tmp_path / "new"), base="org/b\u00e4se@v1", experts={"dtd": "x/dtd", "cars.v2": 'a"b'}
    )
    report = run(plan(config), Silent())
    assert report.to_json() == {"file": str(tmp_path / "new/retex.toml"), "tasks": 2, "written": True}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["retex.toml"]
    space = Workspace.load(tmp_path / "new")
    assert space.base == str(tmp_path / "new/org/b\u00e4se@v1")
    assert space.tasks["dtd"].expert == "x/dtd"
    assert space.tasks["cars.v2"].expert == str(tmp_path / 'new/a"b')
    assert (space.merge.method, space.offsets.budget) == ("average", "0.25%")


def test_paths_of_the_current_directory_are_written_as_the_workspace_sees_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "experts/cars").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    run(plan(InitConfig(folder="new", experts={"cars": "experts/cars"})), Silent())
    assert 'expert = "../experts/cars"' in (tmp_path / "new/retex.toml").read_text()
    expert = Workspace.load(Path("new")).tasks["cars"].expert
    assert expert is not None
    assert Path(expert).samefile(tmp_path / "experts/cars")


def test_an_existing_file_is_kept_unless_asked(tmp_path: Path) -> None:
    file = tmp_path / "retex.toml"
    file.write_text("# mine")
    with pytest.raises(RetexError, match="already exists"):
        plan(InitConfig(folder=str(tmp_path)))
    assert file.read_text() == "# mine"
    run(plan(InitConfig(folder=str(tmp_path), overwrite=True)), Silent())
    assert file.read_text() != "# mine"


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RetexError, match="not a folder"):
        plan(InitConfig(folder=str(tmp_path / "file")))
