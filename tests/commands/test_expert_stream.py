"""Recovering piece by piece: memory stays flat in the model, digests are remembered of unchanged files only."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from retex_cli.io import digests, provenance

if TYPE_CHECKING:
    from tests.conftest import Retex

WIDTH = 1024
MEGABYTE = 1 << 20


def model(folder: Path, layers: int) -> tuple[str, ...]:
    """Merged weights, and offsets of one expert, of so many layers of 16 MB; the arguments that name them."""
    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    shapes = {f"{k}.{name}": (WIDTH, WIDTH) for k in range(layers) for name in "abcd"}
    merged = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    save_file(merged, folder / "merged.safetensors")
    expert = {name: value + 0.01 * torch.randn(WIDTH, WIDTH, generator=draw) for name, value in merged.items()}
    save_file(expert, folder / "expert.safetensors")
    names = ("--merged", str(folder / "merged.safetensors"), "--offsets", str(folder / "offsets.safetensors"))
    command = [sys.executable, "-m", "retex_cli", "fit-offsets", *names[:2], "--quiet", "-o", names[3]]
    subprocess.run([*command, "--expert", f"x={folder / 'expert.safetensors'}", "--budget", "0.25%"], check=True)
    return names


def most_anonymous(command: list[str]) -> int:
    """Bytes of anonymous memory that a process holds at most."""
    process, peak = subprocess.Popen(command), 0
    while process.poll() is None:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        peak = max([peak, *(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))])
        time.sleep(0.002)
    assert process.returncode == 0
    return peak


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    held = []
    for layers in (4, 12):
        names = model(tmp_path / str(layers), layers)
        output = str(tmp_path / f"{layers}.safetensors")
        command = [sys.executable, "-m", "retex_cli", "recover", *names, "--task", "x", "--quiet", "-o", output]
        held.append(most_anonymous([*command, "--device", "cpu", "--threads", "2"]) / MEGABYTE)
    assert held[1] - held[0] < 16, f"{held[0]:.0f} MB with 4 layers of 16 MB, {held[1]:.0f} MB with 12"


def test_a_merged_file_that_did_not_change_is_not_hashed_again(
    made: Path, retex: Retex, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "SMALL", 0)
    monkeypatch.setattr(digests, "YOUNG", 0)
    command = ("recover", "--task", "cars", "--overwrite", "--quiet", "-o")
    assert retex(*command, "first.safetensors").code == 0

    def refuse(*_: object) -> None:
        raise AssertionError("the merged file was hashed again")

    with monkeypatch.context() as patch:
        patch.setattr(provenance.TensorDigest, "update", refuse)
        assert retex(*command, "second.safetensors").code == 0
    assert Path("first.safetensors").read_bytes() == Path("second.safetensors").read_bytes()
    path = Path("merged/model.safetensors")
    before, merged = path.stat(), load_file(path)
    merged["encoder.layer.0.output.dense.weight"][0, 0] += 1
    save_file(merged, path, metadata={"format": "pt"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    result = retex(*command, "third.safetensors")
    assert result.code == 1
    assert "belongs to another merged checkpoint" in result.err
    assert not Path("third.safetensors").exists()
