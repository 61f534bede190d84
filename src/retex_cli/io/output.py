"""What ``-o`` means, and every reason to refuse it before the work begins."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from retex_cli.errors import RetexError, UsageError

#: Files besides the weights that an output may need: config, tokenizer, index.
_SPARE_BYTES = 1 << 20

_FULL = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True, slots=True)
class Output:
    """A parsed ``-o``: a safetensors file, a model folder, or standard output (``path`` is None)."""

    kind: Literal["file", "folder", "stdout"]
    path: Path | None

    @classmethod
    def parse(cls, text: str | Path) -> Output:
        """``-`` streams, ``*.safetensors`` is a file, anything else a folder. UsageError for what is neither."""
        text = str(text)
        if text == "-":
            return cls("stdout", None)
        path = Path(text).expanduser()
        if not text or path.suffix in {".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx"}:
            raise UsageError(
                f"cannot write {text!r}: outputs are safetensors", "use -o name.safetensors, -o name/ or -o -"
            )
        if path.suffix == ".safetensors" and not path.is_dir() and not text.endswith("/"):
            return cls("file", path)
        return cls("folder", path)

    def __str__(self) -> str:
        return "standard output" if self.path is None else str(self.path)

    @property
    def target(self) -> Path:
        """Where the bytes end up, links followed. ValueError for standard output."""
        if self.path is None:
            raise ValueError("standard output has no path")
        return Path(os.path.realpath(self.path))

    def check(self, overwrite: bool, inputs: Sequence[Path] = (), nbytes: int = 0) -> None:
        """RetexError unless ``nbytes`` of weights may and can be written here without touching an input."""
        if self.path is None:
            return
        target = self.target
        self._check_inputs(target, inputs)
        if os.path.lexists(target):
            self._check_existing(target, overwrite)
        parent = _existing_ancestor(target.parent)
        if not parent.is_dir():
            raise RetexError(f"{self}: cannot be written: {parent} is a file", "choose another -o")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise RetexError(f"{self}: cannot be written: no permission in {parent}", "choose another -o")
        free = shutil.disk_usage(parent).free
        if nbytes and nbytes + _SPARE_BYTES > free:
            raise RetexError(
                f"{self}: not enough disk space: {nbytes:,} bytes to write, {free:,} free on {parent}",
                "free some space, or choose another -o",
            )

    def _check_inputs(self, target: Path, inputs: Sequence[Path]) -> None:
        for given in inputs:
            real = Path(os.path.realpath(given))
            same = real == target or (target.exists() and real.exists() and target.samefile(real))
            if same or (self.kind == "folder" and target in real.parents):
                raise RetexError(f"{self}: the output is also an input ({given})", "choose another -o")

    def _check_existing(self, target: Path, overwrite: bool) -> None:
        if self.kind == "file":
            if not target.is_file():
                raise RetexError(f"{self}: exists and is not a regular file", "choose another -o")
        elif not target.is_dir():
            raise RetexError(f"{self}: exists and is not a folder", "choose another -o, or remove it")
        elif not any(target.iterdir()):
            return
        if not overwrite:
            raise RetexError(f"{self}: already exists", "pass --overwrite to replace it, or choose another -o")
        if self.kind == "folder":
            self._check_replaceable(target)

    def _check_replaceable(self, target: Path) -> None:
        """--overwrite removes the whole folder, so the folder must look like a checkpoint and like nothing more."""
        here = Path.cwd()
        if target == here or target in here.parents:
            raise RetexError(f"{self}: replacing it would remove the folder you are in ({here})", "choose another -o")
        names = {path.name for path in target.iterdir()}
        weights = any(name.endswith((".safetensors", ".index.json")) for name in names)
        if not (weights or names & {"config.json", "pytorch_model.bin"}) or names & {".git", "retex.toml"}:
            raise RetexError(
                f"{self}: --overwrite would remove a folder that is not a checkpoint (it holds {sorted(names)[0]!r})",
                "choose another -o, or remove the folder yourself",
            )


def _existing_ancestor(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def write_error(place: object, error: OSError, done: int, total: int) -> RetexError:
    """A failed write in words: what it was, how far it came."""
    if error.errno in _FULL:
        return RetexError(
            f"{place}: the disk is full after {done:,} of {total:,} bytes; an older output is as it was",
            "free some space, or choose another -o",
        )
    if error.errno == errno.EPIPE:
        return RetexError(f"{place}: the reader closed the pipe after {done:,} of {total:,} bytes")
    return RetexError(f"{place}: cannot be written: {error.strerror or error}", "choose another -o")
