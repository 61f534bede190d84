"""The main job on real experts: fine-tune, merge, fit, sign, recover, evaluate; every step a command you could type.

    python examples/demo.py --suite text4

Leaves the workspace ``.demo/SUITE/`` behind: go there and go on typing.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUITES = Path(__file__).resolve().parent / "suites"
REVIEW = "a moving, beautifully acted film about grief"
UNKNOWN = {"text4": REVIEW, "text8": REVIEW, "vision6": "data/orl_faces-reference.safetensors"}
"""Of each suite: an input whose task is to be identified."""


def step(command: list[str], folder: Path) -> None:
    """Show a command line, run it, say how long it took; its failure ends the demo."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    started = time.monotonic()
    program = [str(Path(sys.executable).with_name(command[0])), *command[1:]]
    status = subprocess.run(program, cwd=folder).returncode
    if status:
        sys.exit(f"`{shlex.join(command)}` ended with status {status}")
    print(f"  ({time.monotonic() - started:.1f} s)", flush=True)


def main() -> None:
    """Make the experts, then type the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="text4", choices=tuple(UNKNOWN))
    parser.add_argument("--workspace", type=Path, help="default: .demo/SUITE")
    parser.add_argument("--experts-only", action="store_true", help="stop once the experts are in the cache")
    arguments = parser.parse_args()
    workspace: Path = arguments.workspace or ROOT / ".demo" / arguments.suite
    shutil.rmtree(workspace, ignore_errors=True)
    workspace.mkdir(parents=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from the package index
    started = time.monotonic()
    print(f"Making the experts of {arguments.suite} (cached: a minute each the first time)", flush=True)
    making = [sys.executable, str(SUITES / "make.py"), arguments.suite, str(workspace)]
    if status := subprocess.run(making).returncode:
        sys.exit(status)  # it has said why
    if arguments.experts_only:
        return
    print(f"\nWorkspace: {workspace}", flush=True)
    step(["retex", "merge"], workspace)
    step(["retex", "fit-offsets"], workspace)
    step(["retex", "build-signatures"], workspace)
    step(["retex", "recover"], workspace)
    step(["retex", "recover", "--input", UNKNOWN[arguments.suite], "-o", "identified/"], workspace)
    step(["retex", "eval", "-o", "eval.json"], workspace)
    print(f"\nAll of it took {time.monotonic() - started:.0f} s. Go on in {workspace}:")
    print(f"  cd {os.path.relpath(workspace)} && retex inspect offsets.safetensors")


if __name__ == "__main__":
    main()
