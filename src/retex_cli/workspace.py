"""The file ``retex.toml``: a folder that has one is a workspace, in which every command runs without further flags.

Reading it checks everything that can be checked without opening a model: unknown keys, wrong types and bad task names
are errors that name the file, the key and the closest right name. Imports nothing heavy.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from retex_cli.errors import UsageError

FILE_NAME = "retex.toml"
MERGED = "merged"
OFFSETS = "offsets.safetensors"
SIGNATURES = "signatures.safetensors"
RECOVERED = "recovered"
PROTOCOLS = ("K", "E", "H")

_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?", re.ASCII)
_MODEL = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_WEIGHTS = (".safetensors", ".bin", ".pt")
_RESERVED_TASKS = ("auto",)


@dataclass(frozen=True)
class TaskEntry:
    """One ``[tasks.NAME]``: where its expert and its data are."""

    expert: str | None = None
    inputs: str | None = None
    test: str | None = None
    validation: str | None = None


@dataclass(frozen=True)
class MergeSection:
    """``[merge]``: the method, its options, and ``[merge.override."GLOB"]`` options for the parameters that match."""

    method: str | None = None
    dtype: str | None = None
    max_shard_size: str | int | None = None
    allow_missing: tuple[str, ...] = ()
    samples: int | None = None
    batchnorm: str | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    overrides: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


@dataclass(frozen=True)
class OffsetsSection:
    """``[offsets]``: the byte budget per task (``0.25%``, ``80KB`` or bits per parameter)."""

    budget: str | None = None


@dataclass(frozen=True)
class SignaturesSection:
    """``[signatures]``: the recipe of the features and how many inputs a task gives."""

    preset: str | None = None
    samples: int | None = None
    max_length: int | None = None


@dataclass(frozen=True)
class EvalSection:
    """``[eval]``: how test data is run."""

    batch_size: int | None = None
    protocols: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Workspace:
    """What ``retex.toml`` says; ``file`` is None where there is none and flags must say everything.

    References are ready to open: relative paths are joined to ``folder``, hub ids stand as written.
    """

    folder: Path = Path()
    file: Path | None = None
    base: str | None = None
    model: str | None = None
    merge: MergeSection = MergeSection()
    offsets: OffsetsSection = OffsetsSection()
    signatures: SignaturesSection = SignaturesSection()
    eval: EvalSection = EvalSection()
    tasks: Mapping[str, TaskEntry] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path | None = None) -> Workspace:
        """Read ``folder/retex.toml``; with ``folder`` None, the current directory's if it has one.

        Raises UsageError if the named folder has no ``retex.toml`` or the file cannot be meant.
        """
        place = Path() if folder is None else folder
        file = place / FILE_NAME
        if not file.is_file():
            if folder is None:
                return cls()
            raise UsageError(f"{place} is not a workspace: it has no {FILE_NAME}", f"`retex init {place}` writes one")
        return _Reader(file).workspace()

    @property
    def where(self) -> str:
        """How messages call the place where a missing value could be written."""
        return str(self.file or FILE_NAME)

    def need_base(self, flag: str | None) -> str:
        """The base model's reference: the flag, else the file's."""
        base = flag or self.base
        if base is None:
            raise UsageError("no base model is given", f"--base REF, or `base = ...` under [model] in {self.where}")
        return base

    def with_experts(self, flags: Mapping[str, str]) -> dict[str, str]:
        """Task name to expert's reference: the file's, overridden and completed by ``flags``; at least one."""
        return self._need(self.field("expert", flags), "expert", "--expert NAME=REF")

    def with_inputs(self, flags: Mapping[str, str]) -> dict[str, str]:
        """Task name to unlabelled reference inputs; at least one."""
        return self._need(self.field("inputs", flags), "inputs", "--inputs NAME=PATH")

    def with_tests(self, flags: Mapping[str, str]) -> dict[str, str]:
        """Task name to labelled test data; at least one."""
        return self._need(self.field("test", flags), "test", "--test NAME=PATH")

    def field(self, name: str, flags: Mapping[str, str]) -> dict[str, str]:
        """One field of every task that has it, sorted by task name, with ``flags`` on top."""
        values = {task: value for task, entry in self.tasks.items() if (value := getattr(entry, name)) is not None}
        return dict(sorted({**values, **flags}.items()))

    def path(self, name: str) -> str:
        """A default output or artefact beside the file."""
        return str(self.folder / name)

    def _need(self, found: dict[str, str], key: str, flag: str) -> dict[str, str]:
        if found:
            return found
        if self.file is None:
            raise UsageError("no task is given", f"`retex init` writes a {FILE_NAME} to fill in, or give {flag}")
        if not self.tasks:
            raise UsageError(f"{self.file} has no task", f"add [tasks.NAME] with `{key} = ...`, or give {flag}")
        raise UsageError(f"no task in {self.file} has `{key}`", f"add it under [tasks.NAME], or give {flag}")


def check_task_name(name: str, place: str) -> str:
    """Return ``name`` if it can name a task (it becomes part of paths and tensor names), else raise UsageError."""
    if name in _RESERVED_TASKS:
        raise UsageError(f"{place}: a task cannot be called {name!r}", "`--task auto` means: identify it")
    if not _TASK_NAME.fullmatch(name):
        raise UsageError(f"{place}: {name!r} cannot name a task", "letters, digits, dot, dash and underscore only")
    return name


def closest(name: str, known: Iterable[str]) -> str:
    """A hint that names the closest of ``known``, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"


class _Reader:
    """Turns one parsed file into a Workspace, naming file and key in every complaint."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self.data: dict[str, object] = tomllib.loads(file.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{file}: {error}", "the file is TOML (https://toml.io)") from error

    def workspace(self) -> Workspace:
        sections = ("model", "merge", "offsets", "signatures", "eval", "tasks")
        self._known(self.data, sections, "")
        model, offsets = self._section("model", "base", "model"), self._section("offsets", "budget")
        signatures = self._section("signatures", "preset", "samples", "max_length")
        evaluation = self._section("eval", "batch_size", "protocols")
        base = self._text(model, "model.base")
        return Workspace(
            folder=self.file.parent,
            file=self.file,
            base=None if base is None else self._reference(base),
            model=self._function(self._text(model, "model.model")),
            merge=self._merge(),
            offsets=OffsetsSection(self._text(offsets, "offsets.budget")),
            signatures=SignaturesSection(
                self._text(signatures, "signatures.preset"),
                self._count(signatures, "signatures.samples"),
                self._count(signatures, "signatures.max_length"),
            ),
            eval=EvalSection(self._count(evaluation, "eval.batch_size"), self._protocols(evaluation)),
            tasks={name: self._task(name) for name in sorted(self._table(self.data, "tasks"))},
        )

    def _merge(self) -> MergeSection:
        table = dict(self._table(self.data, "merge"))
        overrides = self._table(table, "override", "merge.override")
        globs = self._texts(table, "merge.allow_missing") or ()
        shard = table.get("max_shard_size")
        if shard is not None and not (isinstance(shard, (int, str)) and not isinstance(shard, bool)):
            raise self._wrong("merge.max_shard_size", 'a size such as "5GB"', shard)
        fields = ("method", "dtype", "max_shard_size", "allow_missing", "samples", "batchnorm", "override")
        return MergeSection(
            self._text(table, "merge.method"),
            self._text(table, "merge.dtype"),
            shard,
            globs,
            self._count(table, "merge.samples"),
            self._text(table, "merge.batchnorm"),
            {key: self._option(f"merge.{key}", value) for key, value in table.items() if key not in fields},
            {glob: self._override(glob, overrides) for glob in overrides},
        )

    def _override(self, glob: str, overrides: Mapping[str, object]) -> dict[str, object]:
        place = f'merge.override."{glob}"'
        return {
            key: self._option(f"{place}.{key}", value) for key, value in self._table(overrides, glob, place).items()
        }

    def _option(self, key: str, value: object) -> object:
        numbers = value.values() if isinstance(value, dict) else ()
        by_task = bool(numbers) and all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers)
        if by_task or isinstance(value, (str, int, float, bool)) or (isinstance(value, list) and value):
            return value
        raise self._wrong(key, "a number, a string, true or false, a list of those, or a table of tasks", value)

    def _task(self, name: str) -> TaskEntry:
        check_task_name(name, f"{self.file}: tasks")
        table = self._table(self._table(self.data, "tasks"), name, f"tasks.{name}")
        self._known(table, ("expert", "inputs", "test", "validation"), f"tasks.{name}.")
        expert = self._text(table, f"tasks.{name}.expert")
        return TaskEntry(
            None if expert is None else self._reference(expert),
            *(self._path(self._text(table, f"tasks.{name}.{key}")) for key in ("inputs", "test", "validation")),
        )

    def _reference(self, text: str) -> str:
        """A model reference: a path beside the file if it is one, a hub id as written if it reads like one."""
        local = self.file.parent / Path(text).expanduser()
        if local.exists() or local.suffix in _WEIGHTS or not _HUB_ID.fullmatch(text):
            return str(local)
        # A path relative to somewhere else would be opened there by the reader: keep it beside the file, and missing.
        return str(local) if Path(text).exists() else text

    def _path(self, text: str | None) -> str | None:
        return None if text is None else str(self.file.parent / Path(text).expanduser())

    def _function(self, text: str | None) -> str | None:
        if text is not None and not _MODEL.fullmatch(text):
            raise self._wrong("model.model", '"package.module:function"', text)
        return text

    def _protocols(self, table: Mapping[str, object]) -> tuple[str, ...] | None:
        chosen = self._texts(table, "eval.protocols")
        for name in chosen or ():
            if name not in PROTOCOLS:
                raise self._wrong("eval.protocols", f"a list out of {', '.join(PROTOCOLS)}", name)
        return chosen

    def _section(self, name: str, *keys: str) -> Mapping[str, object]:
        table = self._table(self.data, name)
        self._known(table, keys, f"{name}.")
        return table

    def _known(self, table: Mapping[str, object], keys: tuple[str, ...], prefix: str) -> None:
        for key in table:
            if key not in keys:
                raise UsageError(f"{self.file}: unknown key {prefix}{key}", closest(key, keys))

    def _table(self, table: Mapping[str, object], key: str, place: str | None = None) -> Mapping[str, object]:
        value = table.get(key, {})
        if not isinstance(value, dict):
            raise self._wrong(place or key, "a table", value)
        return value

    def _text(self, table: Mapping[str, object], place: str) -> str | None:
        value = table.get(place.rpartition(".")[2])
        if value is None or (isinstance(value, str) and value):
            return value
        raise self._wrong(place, "a non-empty string", value)

    def _texts(self, table: Mapping[str, object], place: str) -> tuple[str, ...] | None:
        value = table.get(place.rpartition(".")[2])
        if value is None:
            return None
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            return tuple(str(item) for item in value)
        raise self._wrong(place, "a list of strings", value)

    def _count(self, table: Mapping[str, object], place: str) -> int | None:
        value = table.get(place.rpartition(".")[2])
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
            return value
        raise self._wrong(place, "a whole number above zero", value)

    def _wrong(self, key: str, wanted: str, value: object) -> UsageError:
        return UsageError(f"{self.file}: {key} must be {wanted}, not {value!r}")
