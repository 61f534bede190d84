"""Time and peak anonymous memory of merging a base and eight experts of GPT-2's size, beside a plain copy.

    python benchmarks/merge_memory.py [--folder DIR] [--layers 12] [--methods average ties ...]

Makes the nine models (124 M fp32 parameters each, 4.5 GB in all) under ``--folder``, runs ``retex merge`` once per
method as a process of its own, and writes ``results/merge_memory.json``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from record import write
from safetensors.torch import save_file

METHODS = ("average", "task_arithmetic", "ties", "ties --scope tensor", "dare", "dare_ties")
EXPERTS = 8
WIDTH, VOCABULARY, POSITIONS = 768, 50257, 1024
POLL_SECONDS = 0.01


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of GPT-2's tensors."""
    found: dict[str, tuple[int, ...]] = {"wte.weight": (VOCABULARY, WIDTH), "wpe.weight": (POSITIONS, WIDTH)}
    for layer in range(layers):
        block = {
            "ln_1": (WIDTH,),
            "attn.c_attn": (WIDTH, 3 * WIDTH),
            "attn.c_proj": (WIDTH, WIDTH),
            "ln_2": (WIDTH,),
            "mlp.c_fc": (WIDTH, 4 * WIDTH),
            "mlp.c_proj": (4 * WIDTH, WIDTH),
        }
        for name, shape in block.items():
            found[f"h.{layer}.{name}.weight"] = shape
            found[f"h.{layer}.{name}.bias"] = shape[-1:]
    return {**found, "ln_f.weight": (WIDTH,), "ln_f.bias": (WIDTH,)}


def make(folder: Path, layers: int) -> int:
    """Write base and experts, normal weights plus smaller normal task vectors; the number of parameters."""
    base = {}
    for index, (name, shape) in enumerate(shapes(layers).items()):
        base[name] = 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(index))
    save_file(base, folder / "base.safetensors")
    for expert in range(EXPERTS):
        tensors = {}
        for index, (name, tensor) in enumerate(base.items()):
            generator = torch.Generator().manual_seed(1000 * (expert + 1) + index)
            tensors[name] = tensor + 0.002 * torch.randn(tensor.shape, generator=generator)
        save_file(tensors, folder / f"expert{expert}.safetensors")
    return sum(tensor.numel() for tensor in base.values())


def _anonymous_mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), 0.0)


def run(command: list[str]) -> dict[str, float]:
    """Wall and CPU seconds of a process, and the most anonymous memory it was seen with."""
    started, peak = time.monotonic(), 0.0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        peak = max(peak, _anonymous_mb(process.pid))
        time.sleep(POLL_SECONDS)
    if status:
        sys.exit(f"{' '.join(command)} ended with status {status}")
    return {"wall_s": time.monotonic() - started, "cpu_s": usage.ru_utime + usage.ru_stime, "anon_mb": peak}


def main() -> None:
    """Read the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="default: a temporary one")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch)
        parameters = make(folder, arguments.layers)
        files = sorted(folder.glob("*.safetensors"))
        started = time.monotonic()
        for file in files:
            shutil.copyfile(file, folder / "copy")
        copy = time.monotonic() - started
        (folder / "copy").unlink()
        print(f"copying {sum(file.stat().st_size for file in files) / 1e9:.1f} GB: {copy:.1f} s", flush=True)
        retex = [str(Path(sys.executable).with_name("retex")), "merge", "--base", str(folder / "base.safetensors")]
        for expert in range(EXPERTS):
            retex += ["--expert", f"e{expert}={folder / f'expert{expert}.safetensors'}"]
        results = {}
        for method in arguments.methods:
            output = ["-o", str(folder / "merged.safetensors"), "--overwrite"]
            results[method] = run([*retex, "--method", *method.split(), *output])
            print(f"{method}: " + ", ".join(f"{key} {value:.1f}" for key, value in results[method].items()), flush=True)
    what = f"a base and {EXPERTS} experts of {parameters / 1e6:.0f} M fp32 parameters"
    print(f"wrote {write('merge_memory', {'what': what, 'copy_s': copy, 'methods': results})}")


if __name__ == "__main__":
    main()
