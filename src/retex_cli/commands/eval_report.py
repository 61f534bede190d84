"""What ``retex eval`` hands back: accuracies, ratios, agreement and bytes, as an object and as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from retex_cli.commands.report import Json, Table
from retex_cli.evaluation.confusion import Confusion
from retex_cli.evaluation.intervals import Interval, intervals
from retex_cli.evaluation.protocols import TaskAnswers, TaskScores, mean_scores, score


@dataclass(frozen=True)
class EvalPlanReport:
    """``{"tests": {task: inputs}, "protocols": […]}``."""

    tests: Mapping[str, int]
    protocols: tuple[str, ...]

    def to_json(self) -> Json:
        return {"tests": dict(self.tests), "protocols": list(self.protocols)}

    def tables(self) -> list[Table]:
        return [Table("plan: test inputs", ("task", "inputs"), tuple((t, str(n)) for t, n in self.tests.items()))]

    def lines(self) -> list[str]:
        return [f"protocols {', '.join(self.protocols)}"]


Intervals = Mapping[str, Interval]


@dataclass(frozen=True)
class EvalReport:
    """``{"tasks": {name: {"expert", "merged", "recovered": {"K", "E", "H"}, "identified", "offset_bytes",
    "expert_bytes", "intervals": {figure: [low, high]}, …}}, "mean": {…}, "confusion": {"counts": {task: {task: n}},
    "known", "unknown"} | null, "files": {path: bytes}}``; accuracies are fractions, figures are dotted names within the
    same object."""

    scores: tuple[TaskScores, ...]
    intervals: Mapping[str, Intervals]
    mean_intervals: Intervals
    confusion: Confusion | None
    offset_bytes: Mapping[str, int]
    expert_bytes: Mapping[str, int]
    files: Mapping[str, int]
    precision: str

    @classmethod
    def of(
        cls,
        answers: Sequence[TaskAnswers],
        tasks: Sequence[str],
        offset_bytes: Mapping[str, int],
        expert_bytes: Mapping[str, int],
        files: Mapping[str, int],
        precision: str,
    ) -> Self:
        """Scores, intervals and confusion of what everybody answered; ``tasks`` are all that can be identified."""
        per_task, means = intervals(answers)
        confusion = Confusion.of(answers, tasks)
        scores = tuple(score(given) for given in answers)
        return cls(scores, per_task, means, confusion, offset_bytes, expert_bytes, files, precision)

    def to_json(self) -> Json:
        tasks = {}
        for s in self.scores:
            tasks[s.task] = {
                "inputs": s.inputs,
                "expert": s.expert,
                "merged": s.merged,
                "recovered": dict(s.recovered),
                "normalised": {
                    "merged": s.normalised(s.merged),
                    **{name: s.normalised(value) for name, value in s.recovered.items()},
                },
                "of_known": s.of_known(),
                "agreement": dict(s.agreement),
                "identified": s.identified,
                "unknown": s.unknown,
                "with_unknown": dict(s.with_unknown),
                "intervals": _lists(self.intervals[s.task]),
                "offset_bytes": self.offset_bytes[s.task],
                "expert_bytes": self.expert_bytes[s.task],
            }
        return {
            "tasks": tasks,
            "mean": {**mean_scores(self.scores), "intervals": _lists(self.mean_intervals)},
            "confusion": self.confusion.to_json() if self.confusion else None,
            "files": self.files,
            "precision": self.precision,
        }

    def tables(self) -> list[Table]:
        protocols = list(self.scores[0].recovered)
        total = sum(self.files.values())
        sizes = (*((name, f"{size:,}") for name, size in self.files.items()), ("total", f"{total:,}"))
        tables = [self._answers(protocols), *self._found(), self._intervals(protocols)]
        return [*tables, Table("files", ("file", "bytes"), sizes)]

    def _answers(self, protocols: Sequence[str]) -> Table:
        """What is answered: one row a task, the mean, and the mean of the second reading."""
        columns = ("task", "inputs", "expert", "merged", *protocols, *(f"{p} / expert" for p in protocols))
        columns += ("agrees", "offsets", "share")
        mean = mean_scores(self.scores)
        rows = [self._row(s, protocols) for s in self.scores]
        rows.append(self._mean_row(mean, protocols))
        if second := _group(mean, "with_unknown"):
            cells = (_percent(second.get(p)) for p in protocols)
            rows.append(("mean, unknown is wrong", "", "", "", *cells, *("" for _ in range(len(protocols) + 3))))
        return Table("answers: accuracy (%)", columns, tuple(rows))

    def _found(self) -> list[Table]:
        """What is identified: accuracies and who is taken for whom."""
        if self.confusion is None:
            return []
        columns = ("task", "found", "unknown", "found and known", *(f"{p}, unknown is wrong" for p in "EH"))
        mean = mean_scores(self.scores)
        rows = [
            (s.task, _percent(s.identified), _percent(s.unknown), *_second(s.with_unknown)) for s in self.scores
        ] + [("mean", _percent(mean["identified"]), _percent(mean["unknown"]), *_second(_group(mean, "with_unknown")))]
        taken = ("task", *self.confusion.tasks, "unknown")
        return [
            Table("tasks: identified right (%)", columns, tuple(rows)),
            Table("inputs by the task they were taken for (the nearest)", taken, tuple(self.confusion.rows())),
        ]

    def _intervals(self, protocols: Sequence[str]) -> Table:
        figures = {p: f"recovered.{p}" for p in protocols} | {f"{p} / expert": f"normalised.{p}" for p in protocols}
        figures |= {"found": "identified"} if "identified" in self.mean_intervals else {}
        rows = tuple(
            (task, *(_between(found[figure]) for figure in figures.values()))
            for task, found in [*self.intervals.items(), ("mean", self.mean_intervals)]
        )
        return Table("95 % intervals (bootstrap over the test inputs)", ("task", *figures), rows)

    def _row(self, s: TaskScores, protocols: Sequence[str]) -> tuple[str, ...]:
        share = 100 * self.offset_bytes[s.task] / self.expert_bytes[s.task]
        return (
            s.task,
            f"{s.inputs:,}",
            _percent(s.expert),
            _percent(s.merged),
            *(_percent(s.recovered[p]) for p in protocols),
            *(_percent(s.normalised(s.recovered[p])) for p in protocols),
            _percent(s.agreement.get("K")),
            f"{self.offset_bytes[s.task]:,}",
            f"{share:.3f} %",
        )

    def _mean_row(self, mean: Mapping[str, object], protocols: Sequence[str]) -> tuple[str, ...]:
        share = 100 * sum(self.offset_bytes.values()) / sum(self.expert_bytes.values())
        return (
            "mean",
            "",
            _percent(mean["expert"]),
            _percent(mean["merged"]),
            *(_percent(_group(mean, "recovered").get(p)) for p in protocols),
            *(_percent(_group(mean, "normalised").get(p)) for p in protocols),
            _percent(_group(mean, "agreement").get("K")),
            f"{sum(self.offset_bytes.values()) // len(self.scores):,}",
            f"{share:.3f} %",
        )

    def lines(self) -> list[str]:
        mean = mean_scores(self.scores)
        normalised, worst, of_known = (_group(mean, name) for name in ("normalised", "worst", "of_known"))
        lines = [
            f"merged alone: {_percent(normalised['merged'])} % of the experts' accuracy, "
            f"worst task {_percent(worst['merged'])} %"
        ]
        for name in self.scores[0].recovered:
            share = f", {_percent(of_known[name])} % of protocol K" if name != "K" and of_known else ""
            lines.append(
                f"recovered, protocol {name}: {_percent(normalised[name])} % of the experts' accuracy{share}, "
                f"worst task {_percent(worst[name])} %"
            )
        return lines


def _group(mean: Mapping[str, object], name: str) -> Mapping[str, object]:
    found = mean[name]
    assert isinstance(found, Mapping)
    return found


def _second(figures: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(_percent(figures.get(name)) for name in ("task", "E", "H"))


def _lists(found: Intervals) -> dict[str, list[float]]:
    return {name: list(between) for name, between in found.items()}


def _between(found: Interval) -> str:
    return f"{100 * found[0]:.2f}-{100 * found[1]:.2f}"


def _percent(value: object) -> str:
    return f"{100 * value:.2f}" if isinstance(value, float) else "-"
