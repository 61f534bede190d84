"""Accuracy against bytes on a suite of real experts: fit, write and evaluate at several budgets, full test sets.

    python benchmarks/budgets.py text4

Writes ``results/budgets-SUITE.json``, and ``results/eval-SUITE.json`` for the default budget under all protocols.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from record import ROOT, write

DEFAULT = "0.25%"
"""Evaluated under all protocols, and written by itself, too."""
BUDGETS = ("0.05%", "0.1%", "0.25%", "0.5%", "1%")


def retex(*arguments: str, folder: Path) -> dict[str, object]:
    """One command with ``--json``; its object."""
    program = str(Path(sys.executable).with_name("retex"))
    done = subprocess.run([program, *arguments, "--json"], cwd=folder, check=True, stdout=subprocess.PIPE)
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def main() -> None:
    """Read the command line, run all budgets, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=("text4", "text8"))
    parser.add_argument("--budgets", nargs="+", default=BUDGETS)
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make = ROOT / "examples" / "suites" / "make.py"
        subprocess.run([sys.executable, str(make), arguments.suite, str(folder)], check=True)
        retex("merge", folder=folder)
        signed = retex("build-signatures", folder=folder)
        for budget in arguments.budgets:
            retex("fit-offsets", "--budget", budget, "--overwrite", folder=folder)
            protocols = "K,E,H" if budget == DEFAULT else "K"
            report = retex("eval", "--protocols", protocols, folder=folder)
            rows.append({"budget": budget, "tasks": report["tasks"], "mean": report["mean"], "files": report["files"]})
            if budget == DEFAULT:
                tasks = signed["tasks"]
                assert isinstance(tasks, dict)
                samples = max(task["inputs"] for task in tasks.values())
                print(f"wrote {write(f'eval-{arguments.suite}', {'budget': budget, 'samples': samples, **report})}")
            mean = report["mean"]
            assert isinstance(mean, dict)
            shares = [100 * mean[key]["K"] for key in ("normalised", "worst", "agreement")]
            print("{:>6}: mean {:.2f} %, worst task {:.2f} %, agreement {:.2f} %".format(budget, *shares), flush=True)
    if len(rows) > 1:
        print(f"wrote {write(f'budgets-{arguments.suite}', {'suite': arguments.suite, 'rows': rows})}")


if __name__ == "__main__":
    main()
