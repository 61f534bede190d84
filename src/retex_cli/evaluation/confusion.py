"""Which tasks are taken for which: counts of test inputs by their task and the task they were identified as."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from retex_cli.evaluation.protocols import TaskAnswers

CELL, LABEL, TEXT = 58, 130, 12
DARK = 0.55
"""Pixels of a cell and of the room for names, points of text, and the share from which a cell needs white text."""


@dataclass(frozen=True)
class Confusion:
    """``counts``: task -> identified task -> test inputs, the nearest task forced. ``unknown``: how many of a task's
    inputs would have been called unknown; ``known``: ``counts`` without those."""

    tasks: tuple[str, ...]
    counts: Mapping[str, Mapping[str, int]]
    known: Mapping[str, Mapping[str, int]]
    unknown: Mapping[str, int]

    @classmethod
    def of(cls, answers: Sequence[TaskAnswers], tasks: Sequence[str]) -> Confusion | None:
        """``tasks``: all that can be identified. None where nothing was."""
        counts, known, unknown = {}, {}, {}
        for one in answers:
            if one.identified is None or one.unknown is None:
                return None
            sure = one.identified[~one.unknown]
            counts[one.task] = {task: int((one.identified == task).sum()) for task in tasks}
            known[one.task] = {task: int((sure == task).sum()) for task in tasks}
            unknown[one.task] = int(one.unknown.sum())
        return cls(tuple(tasks), counts, known, unknown)

    def to_json(self) -> dict[str, object]:
        """The fields, as objects by task."""
        return {"counts": self.counts, "known": self.known, "unknown": self.unknown}

    def rows(self) -> list[tuple[str, ...]]:
        """Task, its inputs by identified task, and how many of them would be unknown; a dash for none."""
        return [
            (task, *(f"{row[other]:,}" if row[other] else "-" for other in self.tasks), f"{self.unknown[task]:,}")
            for task, row in self.counts.items()
        ]

    def svg(self) -> str:
        """The counts with the out-of-distribution rule as a picture, shaded by their share of the row."""
        columns = [*self.tasks, "unknown"]
        width, height = LABEL + CELL * len(columns) + 10, LABEL + CELL * len(self.known) + 30
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'font-family="sans-serif" font-size="{TEXT}">',
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        ]
        for k, name in enumerate(columns):
            x = LABEL + CELL * k + CELL // 2
            parts.append(f'<text transform="translate({x},{LABEL - 8}) rotate(-45)">{escape(name)}</text>')
        for k, (task, row) in enumerate(self.known.items()):
            y = LABEL + CELL * k
            place = f'x="{LABEL - 8}" y="{y + CELL // 2 + 4}" text-anchor="end"'
            parts.append(f"<text {place}>{escape(task)}</text>")
            counts = [*(row[other] for other in self.tasks), self.unknown[task]]
            total = max(sum(counts), 1)
            for i, (column, count) in enumerate(zip(columns, counts, strict=True)):
                parts += _cell(LABEL + CELL * i, y, count, count / total, f"{task} as {column}")
        note = "rows: the task of the inputs; columns: what it was identified as; percent of the row"
        parts.append(f'<text x="10" y="{height - 10}" fill="#555555">{note}</text>')
        return "\n".join([*parts, "</svg>"]) + "\n"


def _cell(x: int, y: int, count: int, share: float, title: str) -> list[str]:
    red, green, blue = (round(255 + share * (dark - 255)) for dark in (33, 82, 140))
    found = [
        f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="rgb({red},{green},{blue})" stroke="#dddddd">'
        f"<title>{escape(title)}: {count:,} inputs</title></rect>"
    ]
    if count:
        colour = "#ffffff" if share > DARK else "#222222"
        place = f'x="{x + CELL // 2}" y="{y + CELL // 2 + 4}" text-anchor="middle" fill="{colour}"'
        found.append(f"<text {place}>{100 * share:.1f}</text>")
    return found
