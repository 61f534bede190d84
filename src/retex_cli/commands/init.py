"""``retex init``: a commented ``retex.toml`` to fill in. Asks nothing."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from retex_cli.commands.report import Json, Table
from retex_cli.errors import RetexError
from retex_cli.progress import Progress
from retex_cli.workspace import FILE_NAME

_HEAD = """\
# A folder with this file is a retex workspace: in it every command runs without further flags.
# Paths are relative to this file. A model is a folder, a file or a hub id, org/name[@revision].

[model]
{base}
# model = "package.module:function"      # builds the model where it is no transformers model

[merge]
method = "average"                       # its options stand beside it, for example: density = 0.2
# [merge.override."*.bias"]              # options for the parameters whose names match
# density = 1.0

[offsets]
budget = "0.25%"                         # per task: share of the expert, KB, MB or bits per parameter

# [signatures]
# samples = 128                          # unlabelled inputs per task, 32 to 256
"""

_TASK = """
[tasks.{name}]
expert = {expert}
# inputs = "data/{file}-inputs.jsonl"    # unlabelled: all that fitting and signatures may read
# test = "data/{file}-test.jsonl"        # labelled: read by eval alone
"""

_NO_TASK = """
# One table per expert:
# [tasks.cars]
# expert = "experts/cars"                # a full fine-tune or a LoRA adapter
# inputs = "data/cars-inputs.jsonl"      # unlabelled: all that fitting and signatures may read
# test = "data/cars-test.jsonl"          # labelled: read by eval alone
"""


@dataclass(frozen=True)
class InitConfig:
    """Where the file goes and what it can already say; relative paths are relative to the current directory."""

    folder: str = "."
    base: str | None = None
    experts: Mapping[str, str] = field(default_factory=dict)
    overwrite: bool = False


@dataclass(frozen=True)
class InitPlan:
    """The file and its text."""

    file: Path
    text: str
    tasks: int

    def report(self) -> InitReport:
        """What would be written."""
        return InitReport(self, written=False)


@dataclass(frozen=True)
class InitReport:
    """What was written and what comes next."""

    plan: InitPlan
    written: bool

    def to_json(self) -> Json:
        """``{"file", "tasks", "written"}``, and ``"text"`` for a plan."""
        told: dict[str, object] = {"file": str(self.plan.file), "tasks": self.plan.tasks, "written": self.written}
        return told if self.written else {**told, "text": self.plan.text}

    def tables(self) -> Sequence[Table]:
        """None."""
        return ()

    def lines(self) -> Sequence[str]:
        """The file's text, if it is only planned, or where it is and the next step."""
        if not self.written:
            return (f"would write {self.plan.file}:", "", *self.plan.text.splitlines())
        ready = self.plan.tasks > 0
        return (f"wrote {self.plan.file}", "next: retex merge" if ready else "next: name the base and the tasks in it")


def plan(config: InitConfig) -> InitPlan:
    """Write the text and refuse an existing file; raises RetexError."""
    folder = Path(config.folder)
    file = folder / FILE_NAME
    if file.exists() and not config.overwrite:
        raise RetexError(f"{file}: already exists", "pass --overwrite to replace it")
    if folder.exists() and not folder.is_dir():
        raise RetexError(f"{folder}: is not a folder", "name one: retex init DIR")
    base = '# base = "org/name"                     # what the experts were tuned from'
    if config.base is not None:
        base = f"base = {_quoted(_beside(config.base, folder))}"
    tasks = "".join(
        _TASK.format(name=_key(name), expert=_quoted(_beside(config.experts[name], folder)), file=name)
        for name in sorted(config.experts)
    )
    return InitPlan(file, _HEAD.format(base=base) + (tasks or _NO_TASK), len(config.experts))


def run(plan: InitPlan, progress: Progress) -> InitReport:
    """Write the file whole or not at all."""
    plan.file.parent.mkdir(parents=True, exist_ok=True)
    partial = plan.file.with_name(f".{FILE_NAME}.tmp-{os.getpid()}")
    try:
        partial.write_text(plan.text, encoding="utf-8")
        partial.replace(plan.file)
    finally:
        partial.unlink(missing_ok=True)
    return InitReport(plan, written=True)


def _beside(reference: str, folder: Path) -> str:
    """A relative path of the current directory as seen from ``folder``; anything else as it is."""
    path = Path(reference)
    if path.is_absolute() or not path.exists():
        return reference
    return Path(os.path.relpath(path, folder)).as_posix()


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # a JSON string is a TOML basic string


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _quoted(name)
