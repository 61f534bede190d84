"""Documentation is run: generated pages are fresh, what they show can be typed, the workspace file can be read."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from retex_cli.cli.app import app
from retex_cli.commands.init import InitConfig, plan
from retex_cli.merging.table import METHODS
from retex_cli.workspace import Workspace

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def typed_lines(page: Path) -> list[str]:
    """Every ``retex ...`` of a shell block, without what a shell does around it."""
    text = "\n".join(blocks(page, "sh") + blocks(page, "bash")).replace("\\\n", " ")
    calls = re.findall(r"(?:^|[|&;(] *)retex ([^|&;)>#\n]+)", text, re.MULTILINE)
    return [call.strip() for call in calls]


def can_be_typed(line: str) -> None:
    name, *arguments = shlex.split(line)
    if not name.startswith("-"):
        COMMANDS[name].make_context(name, arguments)


@pytest.mark.parametrize("name", ["cli.md", "methods.md", "identification.md"])
def test_a_generated_page_is_fresh(name: str) -> None:
    pages = runpy.run_path(str(ROOT / "docs" / "generate.py"))["pages"]()
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == pages[name], "run `make docs`"


def test_every_option_and_method_has_its_row() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for name, command in COMMANDS.items():
        section = page.split(f"## retex {name}\n")[1].split("\n## ")[0]
        for parameter in command.params:
            assert f"{parameter.opts[-1]}" in section or parameter.metavar in section
            assert parameter.help, f"{name} {parameter.name} is not explained"
    methods = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert all(f"[{name}](" in methods for name in METHODS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_shows_can_be_typed(page: Path) -> None:
    for line in typed_lines(page):
        can_be_typed(line)


def test_what_cannot_be_typed_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```sh\ncd x && retex merge --metod ties | cat\nretex merge --method \\\n  ties\n```\n")
    assert [line.split() for line in typed_lines(page)] == [["merge", "--metod", "ties"], ["merge", "--method", "ties"]]
    with pytest.raises(Exception, match="--metod"):
        can_be_typed("merge --metod ties")
    can_be_typed("merge --method ties")
    assert typed_lines(ROOT / "docs" / "cli.md"), "the pattern finds something where there is something"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_workspace_file_shown_is_one(page: Path, tmp_path: Path) -> None:
    for text in blocks(page, "toml"):
        (tmp_path / "retex.toml").write_text(text)
        Workspace.load(tmp_path)


def test_the_page_shows_every_key_of_the_workspace_file(tmp_path: Path) -> None:
    (tmp_path / "retex.toml").write_text("\n".join(blocks(ROOT / "docs" / "cli.md", "toml")))
    space = Workspace.load(tmp_path)
    sections = (space, space.merge, space.offsets, space.signatures, space.eval, *space.tasks.values())
    unset = {name for section in sections for name, value in vars(section).items() if value in (None, (), {})}
    assert unset <= {"max_shard_size", "allow_missing"}, "those are named in a comment"


def test_what_init_writes_with_every_comment_opened_is_a_workspace(tmp_path: Path) -> None:
    for experts in ({}, {"cars": "experts/cars"}):
        text = plan(InitConfig(folder=str(tmp_path), experts=experts)).text
        opened = re.sub(r"^# (?=\[|\w+ = )", "", text, flags=re.MULTILINE)
        (tmp_path / "retex.toml").write_text(opened)
        space = Workspace.load(tmp_path)
        assert space.tasks["cars"].expert is not None
        assert space.tasks["cars"].test is not None
        assert (space.base, space.model) == ("org/name", "package.module:function")
        assert space.merge.overrides == {"*.bias": {"density": 1.0}}
        (tmp_path / "retex.toml").unlink()
