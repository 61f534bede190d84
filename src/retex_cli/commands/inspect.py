"""``retex inspect``: what a checkpoint or an artefact holds and how it was made. Reads headers only."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from retex_cli.commands.offsets_header import COMMON
from retex_cli.commands.report import Json, Table
from retex_cli.io.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from retex_cli.io.dtypes import CODES
from retex_cli.progress import Progress

MOST_GROUPS = 40
"""Rows of the tensor table beyond which groups are taken together by their first words."""

TASK_SECTIONS = {"offsets": "offsets", "tensors": "task tensors", "rows": "task tensors", "exact": "correction"}
"""First word of a tensor's name in an offsets file -> column; the task's name follows it."""


@dataclass(frozen=True)
class InspectConfig:
    """A safetensors file, a folder, a torch file or a hub id."""

    path: str


@dataclass(frozen=True)
class Group:
    """Tensors whose names differ in numbers only; ``shapes`` and ``dtypes`` are those that occur."""

    name: str
    tensors: int
    numel: int
    nbytes: int
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class InspectPlan:
    """The opened headers."""

    config: InspectConfig
    checkpoint: Checkpoint

    def report(self) -> InspectReport:
        """All there is to know is known from the headers."""
        return run(self, None)


@dataclass(frozen=True)
class InspectReport:
    """What a file holds; sizes in bytes. ``tasks``: per task of an artefact, bytes by kind and what the header says."""

    path: str
    kind: str
    version: str | None
    retex: str | None
    files: Mapping[str, int]
    groups: tuple[Group, ...]
    dtypes: Mapping[str, int]
    tasks: Mapping[str, Mapping[str, object]]
    recipe: Mapping[str, object]
    metadata: Mapping[str, str]

    def to_json(self) -> Json:
        """``{"path", "format", "format_version", "retex_version", "files": {name: bytes}, "tensors", "parameters",
        "bytes", "dtypes": {name: tensors}, "groups": [{"name", "tensors", "parameters", "bytes", "shapes", "dtypes"}],
        "tasks": {name: {...}}, "recipe": {...}, "metadata": {...}}``; metadata is what no other key tells.
        """
        return {
            "path": self.path,
            "format": self.kind,
            "format_version": self.version,
            "retex_version": self.retex,
            "files": dict(self.files),
            "tensors": sum(group.tensors for group in self.groups),
            "parameters": sum(group.numel for group in self.groups),
            "bytes": sum(group.nbytes for group in self.groups),
            "dtypes": dict(self.dtypes),
            "groups": [
                {
                    "name": group.name,
                    "tensors": group.tensors,
                    "parameters": group.numel,
                    "bytes": group.nbytes,
                    "shapes": [list(shape) for shape in group.shapes],
                    "dtypes": list(group.dtypes),
                }
                for group in self.groups
            ],
            "tasks": {task: dict(row) for task, row in self.tasks.items()},
            "recipe": dict(self.recipe),
            "metadata": dict(self.metadata),
        }

    def tables(self) -> Sequence[Table]:
        """Tasks of an artefact; otherwise tensors by group."""
        if self.tasks:
            columns = tuple(dict.fromkeys(key for row in self.tasks.values() for key in row))
            rows = (
                (task, *(_cell(row.get(column, "")) for column in columns)) for task, row in sorted(self.tasks.items())
            )
            return (Table("Tasks", ("task", *columns), tuple(rows)),)
        return (Table("Tensors", ("group", "tensors", "shape", "dtype", "bytes"), tuple(map(_row, self.groups))),)

    def lines(self) -> Sequence[str]:
        """Totals, then the recipe."""
        count, numel = sum(group.tensors for group in self.groups), sum(group.numel for group in self.groups)
        names = ", ".join(f"{name} x{times}" for name, times in self.dtypes.items())
        size = sum(self.files.values())
        version = f" {self.version}" if self.version else ""
        lines = [
            f"{self.path}: {self.kind}{version}, {size:,} bytes in {', '.join(self.files)}",
            f"{count:,} tensors, {numel:,} elements ({names})",
        ]
        if self.recipe:
            made = f"retex {self.retex}" if self.retex else "retex"
            lines += [f"made by {made}:", *_outline(self.recipe, "  ")]
        return lines


def plan(config: InspectConfig) -> InspectPlan:
    """Open and check the headers; RetexError for what is no checkpoint."""
    folder = Path(config.path)
    adapter = folder / "adapter_model.safetensors"  # no model by itself, but a file that can be looked at
    return InspectPlan(config, open_checkpoint(adapter if adapter.is_file() else config.path))


def run(plan: InspectPlan, progress: Progress | None) -> InspectReport:
    """Sort what the headers say."""
    checkpoint = plan.checkpoint
    metadata = dict(checkpoint.metadata)
    kind, version = _pop(metadata, "format"), _pop(metadata, "format_version")
    recipe = _object(_pop(metadata, "recipe"))
    retex = _pop(metadata, "version") or metadata.pop("retex_version", None) or recipe.get("retex")
    infos = list(checkpoint.tensors.values())
    report = InspectReport(
        path=plan.config.path,
        kind=kind if kind and kind.startswith("retex") else "checkpoint",
        version=version,
        retex=None if retex is None else str(retex),
        files={file.name: file.stat().st_size for file in checkpoint.files if file.exists()},
        groups=_groups(infos),
        dtypes=Counter(CODES[info.dtype] for info in infos),
        tasks=_tasks(kind or "", infos, metadata),
        recipe=recipe,
        metadata=metadata,
    )
    checkpoint.close()
    return report


def _pop(metadata: dict[str, str], key: str) -> str | None:
    """Our keys have a prefix where others read the header, too."""
    plain = metadata.pop(key, None)
    return metadata.pop(f"retex.{key}", plain)


def _groups(infos: Sequence[TensorInfo]) -> tuple[Group, ...]:
    """Few enough groups to read: names with numbers blanked out, shortened until they are."""
    depth = max((info.name.count(".") + info.name.count("/") + 1 for info in infos), default=1)
    while True:
        members: dict[str, list[TensorInfo]] = {}
        for info in infos:
            members.setdefault(_pattern(info.name, depth), []).append(info)
        if len(members) <= MOST_GROUPS or depth == 1:
            return tuple(_group(name, found) for name, found in members.items())
        depth -= 1


def _pattern(name: str, depth: int) -> str:
    parts = name.split(".")
    blanked = ["*" if part.isdigit() else part for part in parts[:depth]]
    return ".".join([*blanked, "…"] if len(parts) > depth else blanked)


def _group(name: str, infos: Sequence[TensorInfo]) -> Group:
    return Group(
        name,
        len(infos),
        sum(info.numel for info in infos),
        sum(info.nbytes for info in infos),
        tuple(dict.fromkeys(info.shape for info in infos)),
        tuple(dict.fromkeys(CODES[info.dtype] for info in infos)),
    )


def _row(group: Group) -> tuple[str, ...]:
    shapes = " ".join(str(list(shape)) for shape in group.shapes[:3]) + (" …" if len(group.shapes) > 3 else "")
    return (group.name, str(group.tensors), shapes, " ".join(group.dtypes), f"{group.nbytes:,}")


def _tasks(kind: str, infos: Sequence[TensorInfo], metadata: dict[str, str]) -> dict[str, dict[str, object]]:
    """Per task of one of our artefacts: bytes by kind, and from the header whose expert it is."""
    if kind not in ("retex.offsets", "retex.signatures"):
        return {}
    records = _object(metadata.pop("tasks", None))
    metadata.pop("checks", None)
    metadata.pop(COMMON, None)
    tasks: dict[str, dict[str, object]] = {task: {} for task in sorted(records)}
    for info in infos:
        section, _, rest = info.name.partition("/")
        if kind == "retex.offsets":
            task, column = rest.partition("/")[0], TASK_SECTIONS.get(section)
        else:
            task, column = section, "bytes"
        if column and rest:
            row = tasks.setdefault(task, {})
            row[column] = int(str(row.get(column, 0))) + info.nbytes
    common = sum(info.nbytes for info in infos if info.name == COMMON)
    for task, record in records.items():
        fields = record if isinstance(record, dict) else {}
        if fields.get("common"):
            tasks[task]["in common"] = common
        known = {"budget": "budget_bytes", "expert size": "expert_bytes", "expert": "expert", "revision": "revision"}
        tasks[task].update({column: fields[key] for column, key in known.items() if fields.get(key) is not None})
    return tasks


def _object(text: str | None) -> dict[str, object]:
    """A JSON object of the header, empty if it is none: a foreign header must not stop an inspection."""
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _outline(value: Mapping[str, object], indent: str) -> list[str]:
    """Nested objects as indented lines; a digest is shortened, the JSON has it in full."""
    lines = []
    for key, item in value.items():
        if isinstance(item, dict) and item:
            lines += [f"{indent}{key}:", *_outline(item, indent + "  ")]
        elif item not in (None, {}, []):
            text = str(item)
            lines.append(f"{indent}{key}: {text[:12] + '…' if len(text) == 64 and text.isalnum() else text}")
    return lines
