"""Plan, run and show one command: the part that is the same for all of them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import typer

from retex_cli.cli.errors import describe
from retex_cli.cli.output import How, note, show_json_line, watch
from retex_cli.errors import GateMissed, RetexError
from retex_cli.progress import Progress

if TYPE_CHECKING:
    from retex_cli.commands.report import Answer, Json, Report, Table


def collect_garbage() -> None:
    """From now on, if that was put off: what has been imported stays, and is not looked at."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


class Plan(Protocol):
    """What ``plan(config)`` gives: everything is checked, nothing is written."""

    def report(self) -> Report:
        """Tensors, bytes in and out, peak memory: what ``--dry-run`` prints."""


ConfigT = TypeVar("ConfigT")
PlanT = TypeVar("PlanT", bound=Plan)


def perform(
    plan: Callable[[ConfigT], PlanT], run: Callable[[PlanT, Progress], Report], config: ConfigT, how: How
) -> None:
    """Plan and, unless only the plan was asked for, run with progress; then show the report."""
    perform_all(plan, run, [config], how)


def perform_all(
    plan: Callable[[ConfigT], PlanT], run: Callable[[PlanT, Progress], Report], configs: Sequence[ConfigT], how: How
) -> None:
    """The same for several configs: all are planned before the first one runs, and one report tells of all.

    A missed gate comes with the report that missed it: both are shown before the command ends with status 3.
    """
    collect_garbage()
    try:
        with how.guard(), watch(quiet=how.quiet) as progress:
            plans = [plan(config) for config in configs]
            reports = [each.report() if how.dry_run else run(each, progress) for each in plans]
    except GateMissed as missed:
        report, failure = getattr(missed, "report", None), describe(missed)
        if report is None or failure is None:
            raise
        how.show(report, failure.to_json())
        if not how.as_json:
            failure.say()
        raise typer.Exit(failure.code) from None
    how.show(reports[0] if len(reports) == 1 else Several(tuple(reports)))


def perform_lines(
    plan: Callable[[ConfigT], PlanT],
    stream: Callable[[PlanT, Progress], Iterator[Sequence[Answer]]],
    config: ConfigT,
    how: How,
) -> None:
    """Plan, and show answers line by line as they come: on standard output, or on standard error why there is none.

    RetexError at the end where some inputs had none, so that the exit status says it.
    """
    collect_garbage()
    planned = plan(config)
    if how.dry_run:
        how.show(planned.report())
        return
    out, total, bad = sys.stdout, 0, 0
    with how.guard(), watch(quiet=how.quiet, bars=not out.isatty()) as progress:
        for answers in stream(planned, progress):
            for answer in answers:
                total, bad = total + 1, bad + answer.bad
                if how.as_json:
                    show_json_line(answer.to_json(), out)
                elif answer.bad:
                    note(answer.line())
                else:
                    print(answer.line(), file=out)
            out.flush()
    if bad:
        raise RetexError(f"{bad} of {total} inputs could not be used", "each is named above; the others are answered")


@dataclass(frozen=True)
class Several:
    """The reports of several runs as one."""

    reports: tuple[Report, ...]

    def to_json(self) -> Json:
        """``{"reports": [...]}`` in the order of the runs."""
        return {"reports": [report.to_json() for report in self.reports]}

    def tables(self) -> list[Table]:
        """One after another."""
        return [table for report in self.reports for table in report.tables()]

    def lines(self) -> list[str]:
        """One after another."""
        return [line for report in self.reports for line in report.lines()]
