"""Bytes of a lossless offsets file beside general compressors, on the weights of one suite's experts.

    python benchmarks/lossless.py text4 --tasks movie

Beside ``retex fit-offsets --lossless``: ``xz -9`` and ``zstd -19`` of the expert's weight file, and what the merged
checkpoint's bits save a compressor: every shared tensor XOR the merged one, all first bytes together, all second ones
and so on, each plane by ``zstd -19``, the expert's other tensors behind them. All count weights alone: no side files.
Writes ``results/lossless.json``, one entry a suite, and goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import lzma
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import zstandard
from record import RESULTS, ROOT, provenance

import retex_cli
from retex_cli.io.align import align
from retex_cli.io.checkpoint import Checkpoint, open_checkpoint
from retex_cli.io.provenance import checkpoint_fingerprint

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def xz(data: bytes) -> int:
    """Bytes under ``xz -9``."""
    return len(lzma.compress(data, preset=9))


def zstd(data: bytes) -> int:
    """Bytes under ``zstd -19``, long-distance matching on."""
    parameters = zstandard.ZstdCompressionParameters.from_level(19, source_size=len(data), enable_ldm=True)
    return len(zstandard.ZstdCompressor(compression_params=parameters).compress(data))


def planes(expert: Checkpoint, merged: Checkpoint) -> list[bytes]:
    """The byte planes of every shared tensor XOR its merged one, and last the bytes of all other tensors."""
    alignment = align(merged, expert, allow_missing=("*",))
    split: dict[tuple[int, int], list[bytes]] = {}
    rest = [expert.read(name) for name in alignment.task]
    for ours, theirs in alignment.shared.items():
        base, tensor = merged.read(ours), expert.read(theirs)
        if base.dtype != tensor.dtype:
            base = base.to(tensor.dtype)
        rest.append(tensor[len(base) :] if ours in alignment.rows else tensor[:0])
        width = tensor.dtype.itemsize
        shared = tensor[: len(base)] if ours in alignment.rows else tensor
        bits = (shared.view(WORDS[width]) ^ base.view(WORDS[width])).numpy().reshape(-1).view(np.uint8)
        for plane in range(width):
            split.setdefault((width, plane), []).append(bits.reshape(-1, width)[:, plane].tobytes())
    verbatim = [tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in rest if tensor.numel()]
    return [*(b"".join(split[key]) for key in sorted(split)), b"".join(verbatim)]


def xor(expert: Checkpoint, merged: Checkpoint) -> int:
    """Bytes of all byte planes under ``zstd -19``."""
    return sum(zstd(plane) for plane in planes(expert, merged))


def ours(merged: Path, expert: str, task: str, folder: Path, threads: int | None) -> dict[str, object]:
    """Fit without loss, recover, compare all bits."""
    file = folder / "exact.safetensors"
    report = retex_cli.fit_offsets(
        str(merged), {task: expert}, str(file), lossless=True, device="cpu", threads=threads, overwrite=True
    )
    back = folder / "back.safetensors"
    retex_cli.recover(str(merged), str(file), str(back), task=task, device="cpu", threads=threads, overwrite=True)
    fingerprints = {checkpoint_fingerprint(open_checkpoint(path)) for path in (back, expert)}
    row = report.rows[task]
    return {
        "bytes": file.stat().st_size - int(str(row["side_file_bytes"])),
        "offset_bytes": row["offset_bytes"],
        "correction_bytes": row["correction_bytes"],
        "task_tensor_bytes": row["task_tensor_bytes"],
        "identical": len(fingerprints) == 1,
    }


def save(suite: str, entry: dict[str, object]) -> Path:
    """Put one suite's entry into the results, with what it was measured by."""
    path = RESULTS / "lossless.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    entry = {**entry, "zstandard": zstandard.__version__, "provenance": provenance()}
    path.write_text(json.dumps({**before, suite: entry}, indent=1) + "\n")
    return path


def measure(suite: str, workspace: Path, tasks: list[str], threads: int | None, again: bool) -> Path:
    """All compressors on every task, each kept once it is done; the merged checkpoint is made of all experts."""
    path = RESULTS / "lossless.json"
    experts = {folder.name: str(folder) for folder in sorted((workspace / "experts").iterdir())}
    before = json.loads(path.read_text()).get(suite, {}) if path.is_file() and not again else {}
    found: dict[str, dict[str, object]] = before.get("tasks", {})
    with tempfile.TemporaryDirectory() as scratch:
        merged = Path(scratch) / "merged"
        retex_cli.merge(str(workspace / "base"), experts, str(merged), device="cpu", threads=threads)
        for task in tasks or list(experts):
            expert = open_checkpoint(experts[task])
            weights = b"".join(file.read_bytes() for file in expert.files)
            row = found.setdefault(task, {"expert_bytes": len(weights)})
            parts: dict[str, Callable[[], object]] = {
                "retex": partial(ours, merged, experts[task], task, Path(scratch), threads),
                "xor": partial(xor, expert, open_checkpoint(merged)),
                "zstd": partial(zstd, weights),
                "xz": partial(xz, weights),
            }
            for name, work in parts.items():
                if name not in row:
                    row[name] = work()
                    save(suite, {"merged_from": list(experts), "tasks": found})
                    print(task, name, row[name], flush=True)
    return save(suite, {"merged_from": list(experts), "tasks": found})


def main() -> None:
    """Read the command line, make the suite unless it is there, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=("text4", "text8", "vision6"))
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="only these; the merge is of all")
    parser.add_argument("--workspace", type=Path, metavar="DIR", help="the suite's workspace, if it is made already")
    parser.add_argument("--again", action="store_true", help="measure what the results have already, too")
    parser.add_argument("--threads", type=int, help="for retex; the compressors have one each")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        workspace = arguments.workspace or Path(scratch)
        if arguments.workspace is None:
            make = ROOT / "examples" / "suites" / "make.py"
            subprocess.run([sys.executable, str(make), arguments.suite, scratch], check=True)
        path = measure(arguments.suite, workspace, arguments.tasks, arguments.threads, arguments.again)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
