"""Is every tensor there and right? The plain average of tiny models of many architectures, by retex and by mergekit.

    python benchmarks/architectures.py [--only BERT,Llama] [--peer-venv DIR]

Each architecture of ``tests/data/architectures.json`` gets a base and two experts with random weights; both tools
average the experts; the model's class loads what came out, and every tensor is compared with the mean. A merge is
``right``, ``lost`` (it loads, and tensors are missing or wrong), ``renamed`` (nothing missing, other names in the
file) or ``failed`` (an error). Written to ``results/architectures.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import tempfile
import warnings
from collections import Counter
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}

import peer
import torch
import transformers
from measure import RETEX, environment
from record import ROOT, write
from safetensors import safe_open

TABLE = ROOT / "tests" / "data" / "architectures.json"
TOLERANCE = 1e-6
LIMIT = 120
"""Seconds that a merge of tiny models may take."""
State = dict[str, torch.Tensor]


def models(folder: Path, row: dict[str, object]) -> tuple[type[transformers.PreTrainedModel], State]:
    """Save ``base``, ``a`` and ``b``; the class, and what their average is."""
    config = getattr(transformers, str(row["config"]))(**row["options"])  # type: ignore[arg-type]
    kind = getattr(transformers, str(row["model"]))
    torch.manual_seed(0)
    base = kind(config)
    base.save_pretrained(folder / "base")
    experts = []
    for name in "ab":
        expert = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(0.001 * torch.randn_like(parameter))
        expert.save_pretrained(folder / name)
        experts.append(expert.state_dict())
    first, second = experts
    return kind, {n: (t + second[n]) / 2 if t.is_floating_point() else t for n, t in first.items()}


def stored(folder: Path) -> set[str]:
    """Names of the tensors in a folder's files."""
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    return names


def verdict(command: list[str], output: Path, folder: Path, kind: type, wanted: State) -> str:
    """Run one tool and look at what it wrote."""
    try:
        done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return "failed"
    if done.returncode or not (names := stored(output)):
        return "failed"
    try:
        found = kind.from_pretrained(output).state_dict()
    except Exception:  # whatever the class says of the files: they do not load
        return "lost"
    right = all(
        name in found and (found[name].double() - tensor.double()).abs().max().item() <= TOLERANCE
        for name, tensor in wanted.items()
        if tensor.numel()
    )
    if names != stored(folder / "base"):
        return "renamed" if right or len(names) == len(stored(folder / "base")) else "lost"
    return "right" if right else "lost"


def compare(row: dict[str, object], binaries: Path) -> dict[str, str]:
    """Both tools on one architecture."""
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(scratch)
        kind, wanted = models(folder, row)
        experts = [folder / "a", folder / "b"]
        ours = [*RETEX, "merge", "--quiet", "--base", str(folder / "base"), "-o", str(folder / "ours")]
        for path in experts:
            ours += ["--expert", f"{path.name}={path}"]
        config = folder / "theirs.yml"
        config.write_text(peer.config("linear", None, experts, "float32", {"weight": 1.0}, {"normalize": True}))
        theirs = peer.command(binaries, config, folder / "theirs")
        return {
            "retex": verdict(ours, folder / "ours", folder, kind, wanted),
            "mergekit": verdict(theirs, folder / "theirs", folder, kind, wanted),
        }


def main() -> None:
    """Read the command line, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: text.split(","), help="some architectures; nothing is written")
    parser.add_argument("--peer-venv", type=Path, default=peer.VENV, help="mergekit's environment; made if it is not")
    arguments = parser.parse_args()
    binaries = peer.install(arguments.peer_venv.absolute())
    rows = json.loads(TABLE.read_text())
    found = {}
    for name in arguments.only or rows:
        found[name] = compare(rows[name], binaries)
        print(f"{name:16} " + "  ".join(f"{side} {what}" for side, what in found[name].items()), flush=True)
    totals = {side: Counter(each[side] for each in found.values()) for side in ("retex", "mergekit")}
    print(totals)
    if not arguments.only:
        versions = peer.versions(arguments.peer_venv)
        result = {"architectures": found, "totals": {s: dict(t) for s, t in totals.items()}, "mergekit": versions}
        print(f"wrote {write('architectures', result)}")


if __name__ == "__main__":
    main()
