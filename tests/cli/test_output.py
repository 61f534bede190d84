from __future__ import annotations

import io
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from retex_cli.cli import output
from retex_cli.cli.output import How, PlainProgress, show, show_json, watch
from retex_cli.commands.report import Json, Table

TITLE = "Tasks, under a title that is longer than a narrow table is wide, and stays on one line"


@dataclass(frozen=True)
class Example:
    def to_json(self) -> Json:
        return {"tasks": {"cars": 0.5}}

    def tables(self) -> Sequence[Table]:
        wide = "a very wide cell " * 6
        return (Table(TITLE, ("task", "score", "path"), (("[bold]cars[/]", "0.5", wide), ("dtd", "–", "x"))),)

    def lines(self) -> Sequence[str]:
        return ("wrote merged/ [1 file]",)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_report_shows_tables_and_lines_as_they_are() -> None:
    stream = io.StringIO()
    show(Example(), stream)
    text = stream.getvalue()
    assert "\x1b" not in text
    assert "[bold]cars[/]" in text
    assert text.splitlines()[0] == TITLE
    assert all(line == line.rstrip() for line in text.splitlines())
    assert "wrote merged/ [1 file]\n" in text
    assert "a very wide cell " * 5 in text, "without a window nothing is wrapped at 80 columns"


def test_numbers_stand_to_the_right(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    show(Example(), stream)
    rows = stream.getvalue().splitlines()
    title = next(row for row in rows if "score" in row)
    cars = next(row for row in rows if "cars" in row)
    assert title.index("score") + len("score") == cars.index("0.5") + len("0.5")


def test_json_has_no_word_for_nan(capsys: pytest.CaptureFixture[str]) -> None:
    show_json({"a": float("nan"), "b": (1.5, True, None, "é"), "c": {"d": float("inf")}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, True, None, "é"], "c": {"d": None}}


@pytest.mark.parametrize(
    ("how", "out", "err"),
    [
        (How(), True, False),
        (How(quiet=True), False, False),
        (How(quiet=True, answer=True), True, False),
        (How(quiet=True, dry_run=True), True, False),
        (How(streams=True), False, True),
        (How(streams=True, quiet=True), False, False),
    ],
)
def test_where_a_report_goes(how: How, out: bool, err: bool, capsys: pytest.CaptureFixture[str]) -> None:
    how.show(Example())
    written = capsys.readouterr()
    assert ("wrote merged/" in written.out, "wrote merged/" in written.err) == (out, err)


def test_json_is_one_object_with_the_failure_inside(capsys: pytest.CaptureFixture[str]) -> None:
    How(as_json=True, quiet=True).show(Example(), {"error": "missed", "hint": None, "code": 3})
    found = json.loads(capsys.readouterr().out)
    assert found == {"tasks": {"cars": 0.5}, "error": "missed", "hint": None, "code": 3}


def test_what_libraries_print_does_not_reach_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    with How(as_json=True).guard():
        print("a library was here")
    with How().guard():
        print("plain")
    written = capsys.readouterr()
    assert (written.out, written.err) == ("plain\n", "a library was here\n")


def test_plain_progress_is_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(output, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    stream = io.StringIO()
    progress = PlainProgress(stream)
    progress.start("merging", 100)
    for _ in range(100):
        progress.advance()
    progress.note("a fallback")
    progress.start("nothing at all", 0)
    progress.start("hashing", 1)
    progress.close(done=False)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "merging ..."
    assert "merging: 3/100, about 517 s left" in lines
    assert len(lines) < 60, "not a line for every step"
    assert lines[-3].startswith("a fallback")
    assert lines[-2].startswith("merging: 100/100 in ")
    assert lines[-1] == "hashing ...", "what was broken off is not called done"
    assert "nothing at all" not in stream.getvalue()
    assert "\r" not in stream.getvalue()


def test_no_bars_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, escapes in ((io.StringIO(), False), (Terminal(), True)):
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys, "stderr", stream)
        with watch(quiet=False) as progress:
            progress.start("merging", 2)
            progress.advance(2)
            progress.note("a [fallback]")
        assert ("\x1b" in stream.getvalue()) is escapes
        assert "merging" in stream.getvalue()
        assert "a [fallback]" in stream.getvalue()


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with watch(quiet=True) as progress:
        progress.start("merging", 2)
        progress.note("a fallback")
        warnings.warn("old news", UserWarning, stacklevel=1)
    assert capsys.readouterr() == ("", "")


def test_warnings_of_libraries_become_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        with watch(quiet=False):
            warnings.warn("two\nlines", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: two lines\n"
