"""What ``retex merge`` tells: where every tensor went, for people and programs, and the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import retex_cli
from retex_cli.commands.merge_plan import Accounts, ExpertAccount
from retex_cli.commands.merge_recipe import Origin, Recipe
from retex_cli.commands.report import Json, Table
from retex_cli.merging.table import Method

SHOWN = 6
"""Names that a line lists before it says how many more there are."""


@dataclass(frozen=True)
class MergeReport:
    """The outcome of a merge, or of its plan (``seconds`` is None, ``ratios`` empty)."""

    output: str
    method: Method
    options: Mapping[str, object]
    overrides: Mapping[str, Mapping[str, object]]
    origin: Origin | None
    seed: int
    accounts: Accounts
    bytes_in: int
    bytes_out: int
    peak_memory: int
    seconds: float | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)
    found: Mapping[str, object] = field(default_factory=dict)

    def finished(
        self, seconds: float, ratios: Mapping[str, float], hashes: Mapping[Path, str], found: Mapping[str, object]
    ) -> MergeReport:
        """The same after the work: its time, ``|tau| / |W0|`` per task, the digest of every input file, and what was
        measured on inputs."""
        digests = {str(path): digest for path, digest in hashes.items()}
        return replace(self, seconds=seconds, ratios=ratios, sha256=digests, found=found)

    def to_json(self) -> Json:
        """The object that ``--json`` prints.

        ``output`` where it went; ``method``, ``paper``, ``options`` (all, with defaults), ``overrides``, ``seed``;
        ``tensors``: ``{"total", "merged", "copied": [names from the base], "partly": {name: [tasks]}, "aliases":
        {tied name: kept name}}``; ``experts``: per task ``{"reference", "revision", "merged", "task_tensors": [names],
        "rows": {name: [common, all]}, "lacks": [base names], "prefix": [removed from base, from expert],
        "task_vector_ratio"}``; ``bytes_in``, ``bytes_out``, ``peak_memory`` (bytes of blocks held at once);
        ``seconds`` and ``sha256`` ``{file: digest}``, null and empty for a plan; ``config`` where the merge was read
        from, or null. What an option gives to single tasks is ``{task: number}``. Only where inputs were
        read: ``measured_inputs`` ``{task: rows}``, ``scale`` ``{"alpha", "by", "tried": {alpha: share}}`` and
        ``batchnorm``.
        """
        a = self.accounts
        return {
            "output": self.output,
            "method": self.method.name,
            "paper": self.method.link,
            "options": dict(self.options),
            "overrides": {glob: dict(options) for glob, options in self.overrides.items()},
            "seed": self.seed,
            **self.found,
            "base": {"reference": a.base, "revision": a.base_revision},
            "tensors": {
                "total": a.total,
                "merged": a.merged,
                "copied": list(a.copied),
                "partly": {name: list(tasks) for name, tasks in a.partly.items()},
                "aliases": dict(a.aliases),
            },
            "experts": {task: self._expert(task, account) for task, account in a.experts.items()},
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "peak_memory": self.peak_memory,
            "seconds": self.seconds,
            "sha256": dict(self.sha256),
            "config": self.origin.to_json() if self.origin else None,
        }

    def _expert(self, task: str, account: ExpertAccount) -> dict[str, object]:
        return {
            "reference": account.reference,
            "revision": account.revision,
            "merged": account.merged,
            "task_tensors": list(account.task_tensors),
            "rows": {name: list(rows) for name, rows in account.rows.items()},
            "lacks": list(account.lacks),
            "prefix": list(account.prefix),
            "task_vector_ratio": self.ratios.get(task),
        }

    def tables(self) -> list[Table]:
        """One row per expert."""
        return [
            Table(
                "Experts",
                ("task", "expert", "merged", "task tensors", "|tau| / |W0|"),
                tuple(
                    (
                        task,
                        account.reference,
                        str(account.merged),
                        str(len(account.task_tensors) + len(account.rows)),
                        f"{self.ratios[task]:.3f}" if task in self.ratios else "-",
                    )
                    for task, account in self.accounts.experts.items()
                ),
            )
        ]

    def lines(self) -> list[str]:
        """What was merged, what was not, and where it is."""
        a = self.accounts
        lines = [f"{a.merged} of {a.total} tensors of {a.base} merged by {self._method_line()}"]
        if self.origin:
            lines += [f"read from {self.origin.path}, SHA-256 {self.origin.sha256}", *self._override_lines()]
        if a.copied:
            lines.append(f"copied from the base, as no expert has a version to merge: {_names(a.copied)}")
        if a.partly:
            lines.append(f"merged from some experts only: {_names(tuple(a.partly))}")
        if a.aliases:
            lines.append(f"tied: {_names(tuple(f'{name} = {kept}' for name, kept in a.aliases.items()))}")
        lines += [line for task, account in a.experts.items() for line in _expert_lines(task, account)]
        if self.seconds is None:
            lines.append(
                f"would read {_size(self.bytes_in)}, write {_size(self.bytes_out)} to {self.output} and hold "
                f"{_size(self.peak_memory)} of tensors at once"
            )
        else:
            lines.append(f"wrote {_size(self.bytes_out)} to {self.output} in {self.seconds:.1f} s")
        return lines

    def _method_line(self) -> str:
        return f"{self.method.name}({_words(self.options)})"

    def _override_lines(self) -> list[str]:
        """Tensors with options of their own, those of equal options together."""
        groups: dict[str, list[str]] = {}
        for name, options in self.overrides.items():
            groups.setdefault(_words(options), []).append(name)
        return [f"{words} for {_names(tuple(names))}" for words, names in groups.items()]


def _words(options: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={_word(value)}" for name, value in options.items())


def _word(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{task}: {_word(number)}" for task, number in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _expert_lines(task: str, account: ExpertAccount) -> list[str]:
    lines = []
    removed = [
        f"{side} {prefix!r}" for side, prefix in zip(("the base's", "its"), account.prefix, strict=True) if prefix
    ]
    if removed:
        lines.append(f"{task}: names match once the prefix {' and '.join(removed)} is removed")
    if account.task_tensors:
        lines.append(f"{task}: task tensors, left to the offsets: {_names(account.task_tensors)}")
    lines += [
        f"{task}: {name} has {rows - common} extra rows, left to the offsets; the first {common} are merged"
        for name, (common, rows) in account.rows.items()
    ]
    return lines


def _names(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def model_card(recipe: Recipe, title: str) -> str:
    """The README of a merged folder: metadata as the Hub reads it, then the recipe in words and in full."""
    hub = [c.reference.partition("@")[0] for c in (recipe.base, *recipe.experts.values()) if _is_hub_id(c.reference)]
    front = ["---", *(["base_model:", *(f"- {name}" for name in dict.fromkeys(hub))] if hub else [])]
    front += ["base_model_relation: merge"] if hub else []
    front += ["library_name: transformers", "tags:", "- merge", "- retex", "---"]
    rows = [f"| {task} | `{c.reference}` | {c.revision or ''} |" for task, c in recipe.experts.items()]
    body = [
        f"# {title}",
        "",
        f"{len(recipe.experts)} experts of `{recipe.base.reference}`"
        + (f" at `{recipe.base.revision}`" if recipe.base.revision else "")
        + f", merged by [{recipe.method.name}]({recipe.method.link}) with retex {retex_cli.__version__}.",
        "",
        "| task | expert | revision |",
        "|---|---|---|",
        *rows,
        "",
        "Recipe, with the SHA-256 of every input file:",
        "",
        "```json",
        json.dumps(recipe.to_json(), indent=2, ensure_ascii=False),
        "```",
        "",
    ]
    return "\n".join([*front, "", *body])


def _is_hub_id(reference: str) -> bool:
    name = reference.partition("@")[0]
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(reference).exists()
