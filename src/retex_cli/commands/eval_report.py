"""What ``retex eval`` hands back: accuracies, ratios, agreement and bytes, as an object and as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from retex_cli.commands.report import Json, Table
from retex_cli.evaluation.protocols import TaskScores, mean_scores


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


@dataclass(frozen=True)
class EvalReport:
    """``{"tasks": {name: {"expert", "merged", "recovered": {"K", "E", "H"}, "identified", "offset_bytes",
    "expert_bytes", …}}, "mean": {…}, "files": {path: bytes}}``; accuracies are fractions."""

    scores: tuple[TaskScores, ...]
    offset_bytes: Mapping[str, int]
    expert_bytes: Mapping[str, int]
    files: Mapping[str, int]
    precision: str

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
                "agreement": dict(s.agreement),
                "identified": s.identified,
                "unknown": s.unknown,
                "with_unknown": dict(s.with_unknown),
                "offset_bytes": self.offset_bytes[s.task],
                "expert_bytes": self.expert_bytes[s.task],
            }
        return {"tasks": tasks, "mean": mean_scores(self.scores), "files": self.files, "precision": self.precision}

    def tables(self) -> list[Table]:
        protocols = list(self.scores[0].recovered)
        columns = ("task", "inputs", "expert", "merged", *protocols, *(f"{p} / expert" for p in protocols))
        columns += ("agrees", "task found", "offsets", "share")
        rows = [self._row(s, protocols) for s in self.scores]
        mean = mean_scores(self.scores)
        rows.append(self._mean_row(mean, protocols))
        tables = [Table("accuracy (%)", columns, tuple(rows))]
        if self.scores[0].with_unknown:
            names = list(self.scores[0].with_unknown)
            counted = tuple(
                (s.task, _percent(s.unknown), *(_percent(s.with_unknown[name]) for name in names)) for s in self.scores
            )
            title = "with the out-of-distribution rule: unknown counts as wrong (%)"
            tables.append(Table(title, ("task", "unknown", *names), counted))
        total = sum(self.files.values())
        sizes = (*((name, f"{size:,}") for name, size in self.files.items()), ("total", f"{total:,}"))
        return [*tables, Table("files", ("file", "bytes"), sizes)]

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
            _percent(s.identified),
            f"{self.offset_bytes[s.task]:,}",
            f"{share:.3f} %",
        )

    def _mean_row(self, mean: Mapping[str, object], protocols: Sequence[str]) -> tuple[str, ...]:
        def get(group: str, name: str) -> str:
            values = mean[group]
            return _percent(values.get(name)) if isinstance(values, Mapping) else _percent(None)

        share = 100 * sum(self.offset_bytes.values()) / sum(self.expert_bytes.values())
        return (
            "mean",
            "",
            _percent(mean["expert"]),
            _percent(mean["merged"]),
            *(get("recovered", p) for p in protocols),
            *(get("normalised", p) for p in protocols),
            get("agreement", "K"),
            _percent(mean["identified"]),
            f"{sum(self.offset_bytes.values()) // len(self.scores):,}",
            f"{share:.3f} %",
        )

    def lines(self) -> list[str]:
        mean = mean_scores(self.scores)
        normalised, worst = mean["normalised"], mean["worst"]
        assert isinstance(normalised, Mapping)
        assert isinstance(worst, Mapping)
        lines = [
            f"merged alone: {_percent(normalised['merged'])} % of the experts' accuracy, "
            f"worst task {_percent(worst['merged'])} %"
        ]
        for name in self.scores[0].recovered:
            lines.append(
                f"recovered, protocol {name}: {_percent(normalised[name])} % of the experts' accuracy, "
                f"worst task {_percent(worst[name])} %"
            )
        return lines


def _percent(value: object) -> str:
    return f"{100 * value:.2f}" if isinstance(value, float) else "-"
