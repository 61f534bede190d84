"""What a command hands back: an object for programs, tables and lines for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

Json = Mapping[str, object]


@dataclass(frozen=True)
class Table:
    """Rows of text under column titles; the command line decides how they look."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class Answer(Protocol):
    """What is said of one input among many; ``bad`` where it could not be used."""

    @property
    def bad(self) -> bool:
        """Whether this is a reason and no answer."""

    def to_json(self) -> Json:
        """The object of ``--json``, which is a line of its own."""

    def line(self) -> str:
        """For a person."""


class Report(Protocol):
    """The result of one command."""

    def to_json(self) -> Json:
        """The object that ``--json`` prints; its keys are documented in ``docs/format.md``."""

    def tables(self) -> Sequence[Table]:
        """What a person wants to see at a glance."""

    def lines(self) -> Sequence[str]:
        """Sentences below the tables: what was written, what was chosen."""
