"""mergekit, in an environment of its own: how it is installed, told what to merge, and called."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from record import ROOT

VENV = ROOT / ".peers" / "mergekit"
PACKAGES = ("mergekit==0.1.5", "torch==2.13.0")
"""mergekit beside the torch that the tests run with."""


def install(venv: Path) -> Path:
    """Make the environment where there is none; its folder of executables."""
    command = venv / "bin" / "mergekit-yaml"
    if not command.is_file():
        print(f"installing {', '.join(PACKAGES)} into {venv}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        subprocess.run([str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return command.parent


def config(
    method: str, base: Path | None, experts: Sequence[Path], dtype: str,
    each: Mapping[str, float], shared: Mapping[str, object],
) -> str:  # fmt: skip
    """A merge of ``experts``: parameters ``each`` has, and those of the whole. JSON, which is YAML too."""
    models = [{"model": str(path), **({"parameters": dict(each)} if each else {})} for path in experts]
    found = {"merge_method": method, "models": models, "parameters": dict(shared), "dtype": dtype}
    return json.dumps(found if base is None else {**found, "base_model": str(base)})


def command(binaries: Path, config_file: Path, output: Path) -> list[str]:
    """The call that merges by such a file; the models here have no tokenizers to copy."""
    return [str(binaries / "mergekit-yaml"), str(config_file), str(output), "--no-copy-tokenizer"]


def versions(venv: Path) -> dict[str, str]:
    """What is installed in the environment."""
    asked = [package.partition("==")[0] for package in PACKAGES] + ["transformers"]
    code = f"import json; from importlib.metadata import version; print(json.dumps({{n: version(n) for n in {asked}}}))"
    found = subprocess.run([str(venv / "bin" / "python"), "-c", code], capture_output=True, text=True, check=True)
    return dict(json.loads(found.stdout))
