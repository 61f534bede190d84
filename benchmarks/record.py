"""Where benchmark results go, and what is written beside them: the commit, the machine, the versions."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def provenance() -> dict[str, object]:
    """The commit the numbers were taken at (``+`` where sources differed from it) and what they were taken on."""
    changed = _git("status", "--porcelain", "--", "src", "examples", "benchmarks/*.py")
    return {
        "commit": _git("rev-parse", "HEAD") + ("+" if changed else ""),
        "cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy", "constriction")},
    }


def write(name: str, result: dict[str, object]) -> Path:
    """``results/NAME.json``, with ``provenance`` inside."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**result, "provenance": provenance()}, indent=1) + "\n")
    return path


def write_part(name: str, part: str, result: dict[str, object]) -> Path:
    """``results/NAME.json`` with this in place of its ``part``, which has a ``provenance`` of its own."""
    path = RESULTS / f"{name}.json"
    parts = json.loads(path.read_text()) if path.is_file() else {}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**parts, part: {**result, "provenance": provenance()}}, indent=1) + "\n")
    return path
