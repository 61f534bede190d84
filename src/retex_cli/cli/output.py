"""Everything that is shown: reports to standard output; progress, warnings and hints to standard error.

Progress is bars on a terminal and plain lines elsewhere. With ``--json`` standard output carries exactly one object.
"""

from __future__ import annotations

import json
import math
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from retex_cli.errors import UsageError
from retex_cli.progress import Progress, Silent

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID
    from rich.table import Table as RichTable

    from retex_cli.commands.report import Report, Table

EVERY_SECONDS = 10.0  # between two plain progress lines of one stage: a log that stays readable
TABLE_COLUMNS = 200  # a table is never folded into a narrow window: numbers broken over lines cannot be read


def note(text: str) -> None:
    """One line for a person on standard error."""
    print(text, file=sys.stderr, flush=True)


def show_json(value: Mapping[str, object]) -> None:
    """The one object of ``--json``; a number that is none becomes null, as JSON has no word for it."""
    print(json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False), flush=True)


def show_json_line(value: Mapping[str, object], stream: TextIO | None = None) -> None:
    """An object on one line: failures, and each answer where there are many."""
    stream = sys.stdout if stream is None else stream
    print(json.dumps(_plain(value), ensure_ascii=False, allow_nan=False), file=stream)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)


def show(report: Report, stream: TextIO | None = None) -> None:
    """Tables, then sentences."""
    stream = sys.stdout if stream is None else stream
    for table in report.tables():
        _show_table(table, stream)
    for line in report.lines():
        print(line, file=stream)
    stream.flush()


def _show_table(table: Table, stream: TextIO) -> None:
    """The title on a line of its own, the table, an empty line."""
    console = _console(stream, TABLE_COLUMNS)
    with console.capture() as captured:
        if table.title:
            console.print(table.title, style="italic", soft_wrap=True)
        console.print(_rich_table(table))
    print("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()), file=stream)


def _console(stream: TextIO, width: int | None = None) -> Console:
    from rich.console import Console

    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def _rich_table(table: Table) -> RichTable:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, column in enumerate(table.columns):
        numeric = all(_is_number(row[index]) for row in table.rows)
        drawn.add_column(Text(column), justify="right" if numeric else "left", overflow="fold")
    for row in table.rows:
        drawn.add_row(*(Text(cell) for cell in row))
    return drawn


def _is_number(cell: str) -> bool:
    return not cell.strip("-– ") or cell.lstrip("+-≤≥<>~ ")[:1].isdigit()


class PlainProgress:
    """A line when a stage begins, one every ten seconds while it lasts, one at its end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._label, self._total, self._done = "", 0, 0
        self._began = self._last = 0.0

    def start(self, label: str, total: int) -> None:
        """Begin a stage; the one before it has ended."""
        self.close()
        if total < 1:  # nothing to wait for
            return
        with self._lock:
            self._label, self._total, self._done = label, total, 0
            self._began = self._last = time.monotonic()
            self._say(f"{label} ...")

    def advance(self, steps: int = 1) -> None:
        """Count steps; say so when the last line is old enough. Safe from any thread."""
        with self._lock:
            self._done += steps
            if 0 < self._done < self._total and time.monotonic() - self._last >= EVERY_SECONDS:
                self._last = time.monotonic()
                left = (self._last - self._began) / self._done * (self._total - self._done)
                self._say(f"{self._label}: {self._done}/{self._total}, about {left:.0f} s left")

    def note(self, text: str) -> None:
        """One line."""
        with self._lock:
            self._say(text)

    def close(self, *, done: bool = True) -> None:
        """End the stage at hand, if there is one; ``done`` says whether it was finished."""
        with self._lock:
            if self._label and done:
                self._say(f"{self._label}: {self._done}/{self._total} in {time.monotonic() - self._began:.1f} s")
            self._label = ""

    def _say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class BarProgress:
    """A bar per stage on a terminal; notes appear above it."""

    def __init__(self, stream: TextIO) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        self._bars = Bars(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=_console(stream))
        self._stage: TaskID | None = None

    def start(self, label: str, total: int) -> None:
        """Begin a stage; the bar of the one before it stops."""
        if self._stage is not None:
            self._bars.stop_task(self._stage)
        self._stage = None
        if total > 0:
            self._bars.start()
            self._stage = self._bars.add_task(label, total=total)

    def advance(self, steps: int = 1) -> None:
        """Move the bar."""
        if self._stage is not None:
            self._bars.advance(self._stage, steps)

    def note(self, text: str) -> None:
        """One line above the bar."""
        self._bars.console.print(text, soft_wrap=True)

    def close(self, *, done: bool = True) -> None:
        """Leave the bars as they stand."""
        self._bars.stop()


@contextmanager
def watch(*, quiet: bool, bars: bool = True) -> Iterator[Progress]:
    """Progress for one run on standard error, and library warnings through the same door.

    Without ``bars`` it is plain lines on a terminal, too: results are written there meanwhile.
    """
    if quiet:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield Silent()
        return
    shown = BarProgress(sys.stderr) if bars and sys.stderr.isatty() else PlainProgress(sys.stderr)
    finished = False
    try:
        with _warnings_as_notes(shown):
            yield shown
        finished = True
    finally:
        shown.close(done=finished)


@contextmanager
def _warnings_as_notes(progress: Progress) -> Iterator[None]:
    def say(message: Warning | str, *_: object, **__: object) -> None:
        progress.note("warning: " + " ".join(str(message).split()))

    with warnings.catch_warnings():
        # catch_warnings puts the old function back afterwards.
        warnings.showwarning = say
        yield


@dataclass(frozen=True)
class How:
    """What the common flags ask of the output; ``answer`` marks commands whose report is the point of running them."""

    dry_run: bool = False
    quiet: bool = False
    as_json: bool = False
    streams: bool = False  # the weights themselves go to standard output
    answer: bool = False

    def __post_init__(self) -> None:
        """Standard output can carry weights or an object, not both."""
        if self.as_json and self.streams:
            raise UsageError("--json and -o - both want standard output", "write to a file: -o NAME.safetensors")

    def guard(self) -> AbstractContextManager[object]:
        """While work runs under ``--json``, what libraries print goes to standard error."""
        return redirect_stdout(sys.stderr) if self.as_json else nullcontext()

    def show(self, report: Report, failure: Mapping[str, object] | None = None) -> None:
        """Print the result where and how it was asked for, with ``failure`` beside it in the object of ``--json``."""
        if self.as_json:
            show_json({**report.to_json(), **(failure or {})})
        elif self.answer or self.dry_run or not self.quiet:
            show(report, sys.stderr if self.streams else None)
