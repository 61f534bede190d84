"""What a fit tells when it is done, or would do: bytes of every task, and how well a target was reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from retex_cli.commands.agreement import Agreement
from retex_cli.commands.fitting import FittedTask
from retex_cli.commands.report import Json, Table
from retex_cli.commands.task_fit import TaskFit


@dataclass(frozen=True)
class FitOffsetsReport:
    """``{"output", "budget", "bytes", "tasks": {name: {"expert", "budget_bytes", "offset_bytes", "correction_bytes",
    "task_tensor_bytes", "side_file_bytes", "expert_bytes"}}, "removed": [task], "kept": [task]}``; a plan has neither
    ``bytes`` nor those of offsets, correction and side files. Offsets and budget count a task's share of what
    offsets have in common. Where a target was to be reached a task has ``agreement``, too: ``{"share", "inputs",
    "resolution"}``; where answers were compared, ``kept``: see ``guard.Choice``. ``tasks`` are those that were fitted,
    ``kept`` those that stayed as they were.
    """

    output: str
    budget: str
    rows: Mapping[str, Mapping[str, object]]
    written: int | None
    removed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    def to_json(self) -> Json:
        return {
            "output": self.output,
            "budget": self.budget,
            "bytes": self.written,
            "tasks": self.rows,
            "removed": list(self.removed),
            "kept": list(self.kept),
        }

    def tables(self) -> list[Table]:
        exact = any(row.get("correction_bytes") for row in self.rows.values())
        agreed = {
            task: (str(Agreement.from_json(row["agreement"])),) for task, row in self.rows.items() if "agreement" in row
        }
        columns: tuple[str, ...] = ("task", "offsets", *(["correction"] if exact else []))
        columns += ("task tensors", "side files", "expert")
        rows = []
        for task, row in self.rows.items():
            sizes = [row.get("offset_bytes", row["budget_bytes"]), *([row["correction_bytes"]] if exact else [])]
            share = f"{100 * sum(int(str(size)) for size in sizes) / int(str(row['expert_bytes'])):.3f} %"
            sizes += [row["task_tensor_bytes"], row.get("side_file_bytes", "-"), row["expert_bytes"]]
            cells = [f"{size:,}" if isinstance(size, int) else str(size) for size in sizes]
            rows.append((task, *cells, share, *agreed.get(task, ())))
        if not rows:
            return []
        columns += ("offsets + correction / expert" if exact else "offsets / expert",)
        columns += ("agreement with the expert",) if agreed else ()
        return [Table("bytes per task" if self.written else "plan: bytes per task", columns, tuple(rows))]

    def lines(self) -> list[str]:
        changes = [f"removed {', '.join(self.removed)}"] if self.removed else []
        if self.kept:
            changes.append(f"{', '.join(self.kept)}: as before, byte for byte")
        if self.rows:
            changes.append(f"budget of each task: {self.budget}")
        if self.written is None:
            return changes
        return [*changes, f"wrote {self.output}: {self.written:,} bytes for {len(self.rows) + len(self.kept)} tasks"]


def fitted_row(fit: TaskFit, fitted: FittedTask, stored: Mapping[str, bytes]) -> dict[str, object]:
    """One task of the report; ``stored``: its side files that the merged folder does not have, by SHA-256."""
    return {
        **fit.row(),
        "budget_bytes": fitted.record.budget_bytes,
        "offset_bytes": fitted.record.offset_bytes,
        "correction_bytes": fitted.record.correction_bytes,
        "side_file_bytes": sum(map(len, stored.values())),
        "expert_bytes": fitted.record.expert_bytes,
        **({"agreement": fitted.agreement.to_json()} if fitted.agreement else {}),
        **({"kept": fitted.kept} if fitted.kept else {}),
    }
