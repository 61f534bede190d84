"""How a merge is remembered: the recipe in the header, and the digests of what went in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

import retex_cli
from retex_cli.io.checkpoint import Checkpoint
from retex_cli.io.digests import sha256_file
from retex_cli.merging.table import Method
from retex_cli.parallel import thread_count


@dataclass(frozen=True)
class Origin:
    """The configuration of another tool that a merge was read from; ``notes`` are lines a person should read."""

    path: str
    sha256: str
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """``{"path", "sha256", "notes"}``."""
        return {"path": self.path, "sha256": self.sha256, "notes": list(self.notes)}


def placeholder(index: int) -> str:
    """A unique text as long as a SHA-256 in hexadecimal, to be replaced by one."""
    return f"pending-{index:056d}"


@dataclass(frozen=True)
class Recipe:
    """How the output is made, in full: what somebody needs to make it again."""

    method: Method
    options: Mapping[str, object]
    overrides: Mapping[str, Mapping[str, object]]
    origin: Origin | None
    seed: int
    dtype: str | None
    allowed: Mapping[str, object]
    found: Mapping[str, object]
    base: Checkpoint
    experts: Mapping[str, Checkpoint]
    hashes: Mapping[Path, str]

    def to_json(self) -> dict[str, object]:
        """``{"command", "retex", "method", "paper", "options", "overrides", "seed", "dtype", "base", "experts"}``, what
        was let through and what was measured on inputs; each input as ``{"reference", "revision", "files": {file name:
        SHA-256}}``. ``"config"`` is there if the merge was read from another tool's: ``{"path", "sha256", "notes"}``.
        """
        return {
            "command": "merge",
            "retex": retex_cli.__version__,
            "method": self.method.name,
            "paper": self.method.link,
            "options": dict(self.options),
            "overrides": {glob: dict(options) for glob, options in self.overrides.items()},
            "seed": self.seed,
            "dtype": self.dtype,
            **self.allowed,
            **self.found,
            **({"config": self.origin.to_json()} if self.origin else {}),
            "base": self._input(self.base),
            "experts": {task: self._input(expert) for task, expert in self.experts.items()},
        }

    def _input(self, checkpoint: Checkpoint) -> dict[str, object]:
        return {
            "reference": checkpoint.reference,
            "revision": checkpoint.revision,
            "files": {path.name: self.hashes[path] for path in checkpoint.files},
        }

    def metadata(self) -> dict[str, str]:
        """Header of the merged checkpoint's files."""
        return {
            "format": "pt",
            "retex.format": "retex.merged",
            "retex.format_version": "1",
            "retex.version": retex_cli.__version__,
            "retex.recipe": json.dumps(self.to_json(), ensure_ascii=False),
        }


def config_with_dtype(config: Mapping[str, object], dtype: torch.dtype) -> bytes:
    """``config.json`` that names the type in which the weights are written."""
    name = str(dtype).removeprefix("torch.")
    given = {key: name if key in ("torch_dtype", "dtype") else value for key, value in config.items()}
    if not {"torch_dtype", "dtype"} & set(given):
        given["dtype"] = name
    return (json.dumps(given, indent=2, ensure_ascii=False) + "\n").encode()


class Hashing:
    """SHA-256 of files: beside the merge on whatever is idle, or after it if ``threads`` are counted."""

    def __init__(self, files: Iterable[Path], threads: int | None) -> None:
        self._files = dict.fromkeys(files)
        self._pool = ThreadPoolExecutor(min(len(self._files), thread_count(threads)), "sha256")
        self._pending = {} if threads else self._begin()

    def _begin(self) -> dict[Path, Future[str]]:
        return {path: self._pool.submit(sha256_file, path) for path in self._files}

    def all(self) -> dict[Path, str]:
        """File -> hexadecimal digest, once all are known."""
        self._pending = self._pending or self._begin()
        return {path: future.result() for path, future in self._pending.items()}

    def close(self) -> None:
        """Forget what has not begun."""
        self._pool.shutdown(cancel_futures=True)
