"""The header of an offsets artefact: what it says of every task. ``docs/format.md`` is its contract."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches

import torch
from torch import Tensor

from retex_cli.commands import checks
from retex_cli.errors import RetexError, UsageError
from retex_cli.io.align import Alignment
from retex_cli.io.artefact import open_artefact
from retex_cli.io.checkpoint import Checkpoint
from retex_cli.io.dtypes import CODES, DTYPES

FORMAT = "retex.offsets"
PLAIN, LOSSLESS, SHARING = 1, 2, 3
"""Versions: a file has the first that knows all that is in it, so that it can be read by what knows no later one."""
COMMON = "common"
"""Tensor and header entry of what several tasks have in common."""


@dataclass(frozen=True)
class TaskRecord:
    """What the header says of one task.

    ``names``: merged name -> expert name where swapping ``prefix`` does not give it. ``absent``: merged tensors that
    the expert does not have. ``dtype``: the expert's usual element type, ``dtypes`` the exceptions by expert name.
    ``rows``: merged name -> rows in common, where the expert has more. ``files``: side file -> SHA-256.
    ``fingerprint`` is the expert's, ``checksum`` the SHA-256 of the coded offsets. ``correction_bytes``: what makes a
    lossless task's expert exact; 0 for any other. ``common``: whether the file's common part belongs to its offsets.
    """

    expert: str
    revision: str | None
    fingerprint: str
    expert_bytes: int
    offset_bytes: int
    budget_bytes: int
    checksum: str
    prefix: tuple[str, str]
    names: Mapping[str, str]
    absent: tuple[str, ...]
    dtype: str
    dtypes: Mapping[str, str]
    rows: Mapping[str, int]
    files: Mapping[str, str]
    correction_bytes: int = 0
    common: bool = False

    @classmethod
    def from_json(cls, value: Mapping[str, object]) -> TaskRecord:
        fields = dict(value)
        fields["prefix"] = tuple(fields["prefix"])  # type: ignore[arg-type]
        fields["absent"] = tuple(fields["absent"])  # type: ignore[arg-type]
        return cls(**fields)  # type: ignore[arg-type]

    def expert_name(self, merged_name: str) -> str:
        """What the expert calls a merged tensor."""
        if merged_name in self.names:
            return self.names[merged_name]
        return self.prefix[1] + merged_name.removeprefix(self.prefix[0])

    def expert_dtype(self, expert_name: str) -> torch.dtype:
        return DTYPES[self.dtypes.get(expert_name, self.dtype)]


def naming(alignment: Alignment) -> dict[str, str]:
    """The names that swapping the prefix does not give."""
    ours, theirs = alignment.prefix
    return {name: expert for name, expert in alignment.shared.items() if theirs + name.removeprefix(ours) != expert}


def usual_dtype(dtypes: Mapping[str, torch.dtype]) -> tuple[str, dict[str, str]]:
    """The most frequent element type, and the exceptions by name."""
    codes = {name: CODES[dtype] for name, dtype in dtypes.items()}
    usual = max(sorted(set(codes.values())), key=list(codes.values()).count)
    return usual, {name: code for name, code in sorted(codes.items()) if code != usual}


@dataclass(frozen=True)
class Header:
    """What a file says of its tasks: records by task, why others cannot be believed, and digests (see ``checks``)."""

    records: Mapping[str, TaskRecord]
    damaged: Mapping[str, str]
    checks: Mapping[str, str]


def open_offsets(path: str) -> tuple[Checkpoint, Header]:
    """An offsets artefact by its header. RetexError for any other file and for a header damaged as a whole."""
    file = open_artefact(path, format=FORMAT, versions={PLAIN, LOSSLESS, SHARING})
    try:
        entries = json.loads(file.metadata["tasks"])
        found = json.loads(file.metadata.get(checks.KEY, "{}"))
        digests = file.tensors["digests"]
        if not file.metadata["merged"] or digests.dtype != torch.uint8 or len(digests.shape) != 2:
            raise ValueError("what belongs to it is not said")
        records, hurt = {}, {}
        for task in sorted(entries):
            try:
                records[task] = TaskRecord.from_json(entries[task])
                if found and found.get(task) != checks.of_record(entries[task]):
                    raise ValueError("its entry has another digest")
            except (KeyError, TypeError, ValueError) as error:
                records.pop(task, None)
                hurt[task] = f"in the header: {error}"
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RetexError(f"{path}: damaged header: {error}", "fit the offsets again") from error
    return file, Header(records, hurt, found)


def task_record(path: str, records: Mapping[str, TaskRecord], name: str) -> TaskRecord:
    """UsageError, with the closest names, for a task that the file does not have."""
    if name in records:
        return records[name]
    close = get_close_matches(name, records, 3, 0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(records)}"
    raise UsageError(f"{path}: no task {name!r}", hint)


def header_of(records: Mapping[str, TaskRecord], own: Mapping[str, str]) -> dict[str, str]:
    """The header entries of these tasks; ``own``: digests of their own tensors, by name in the file."""
    entries = {task: asdict(records[task]) for task in sorted(records)}
    for entry in entries.values():
        for later in ("correction_bytes", "common"):  # unknown to readers of earlier versions
            if not entry[later]:
                del entry[later]
    found = {**{task: checks.of_record(entry) for task, entry in entries.items()}, **own}
    return {"tasks": json.dumps(entries, separators=(",", ":")), checks.KEY: json.dumps(found, sort_keys=True)}


def share_of(records: Mapping[str, TaskRecord], nbytes: int) -> int:
    """What a common part of ``nbytes`` counts for each task that uses it, rounded up; 0 where none does."""
    users = sum(record.common for record in records.values())
    return -(-nbytes // users) if users else 0


def version_of(records: Mapping[str, TaskRecord]) -> int:
    """The version of a file with these tasks."""
    if any(record.common for record in records.values()):
        return SHARING
    return LOSSLESS if any(record.correction_bytes for record in records.values()) else PLAIN


def digest_rows(digests: Mapping[str, bytes]) -> Tensor:
    """uint8 [tensors, 8]: the start of each digest, enough to name the tensor that differs."""
    return torch.tensor([list(digests[name][:8]) for name in sorted(digests)], dtype=torch.uint8).reshape(-1, 8)
