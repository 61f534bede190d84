"""A budget of memory is obeyed: by the arithmetic of its shares, and by processes that are watched."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from retex_cli.merging import budget
from retex_cli.merging.memory import Held
from retex_cli.merging.table import METHODS, find_method
from retex_cli.merging.view import View

SHAPES = {"embedding": (16384, 256), "square": (512, 512), "tall": (1536, 384), "wide": (384, 1536), "vector": (512,)}
TASKS = ("a", "b", "c", "d")
MEGABYTE = 1 << 20


def views() -> list[View]:
    nothing = Held("", torch.empty(0))
    return [View(name, shape, TASKS, nothing, (nothing,) * len(TASKS)) for name, shape in SHAPES.items()]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("threads", [1, 2, 16])
def test_shares_and_blocks_never_exceed_a_budget_that_is_accepted(name: str, threads: int) -> None:
    method = find_method(name)
    least, usual = budget.least(method, views(), threads), budget.usual(method, views(), threads)
    for given in (least, least + 5 * MEGABYTE, 3 * least, usual):
        chosen = budget.fitted(method, views(), threads, given)
        blocks, shares = budget.block_bytes(method, chosen, threads), budget.split(method, chosen, threads, given)
        assert given < usual or all(view.block is None for view in chosen), "the fastest blocks where nobody is short"
        assert blocks + shares.finished + shares.ahead <= given
        assert shares.ahead >= max(budget.first_pass_bytes(method, view) for view in views())
        assert 4 * threads * shares.values <= max(shares.ahead, 4 * threads * budget.GRID)


@pytest.mark.parametrize("name", ["ties", "tsv_m", "doge"])
def test_the_usual_budget_has_room_for_every_worker_and_does_not_grow_with_the_number_of_tensors(name: str) -> None:
    method, few = find_method(name), views()
    usual = budget.usual(method, few, 2)
    needs = sorted(budget.first_pass_bytes(method, view) for view in few)
    assert budget.split(method, few, 2, usual).ahead >= sum(needs[-2:])
    assert budget.usual(method, few * 10, 2) <= usual + needs[-1]


@dataclass(frozen=True)
class Watched:
    """What a process took: bytes of anonymous memory at most, CPU seconds in user mode, wall seconds."""

    anonymous: int
    user: float
    wall: float


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``large``: the shapes above, several times; ``tiny``: one small tensor, for what any merge takes."""
    folders = {}
    for kind, times, shapes in (("large", 3, SHAPES), ("tiny", 1, {"w": (8, 8)})):
        folders[kind] = folder = tmp_path_factory.mktemp(kind)
        base = {f"{i}.{name}": torch.randn(shape) for i in range(times) for name, shape in shapes.items()}
        save_file(base, folder / "base.safetensors")
        for task in TASKS:
            save_file({n: t + 0.05 * torch.randn(t.shape) for n, t in base.items()}, folder / f"{task}.safetensors")
    return folders


def merge(folder: Path, output: Path, *options: str) -> Watched:
    command = [sys.executable, "-m", "retex_cli", "merge", "--quiet", "--device", "cpu", "--overwrite", "-o"]
    command += [str(output), "--base", str(folder / "base.safetensors"), *options]
    for task in TASKS:
        command += ["--expert", f"{task}={folder / task}.safetensors"]
    began, peak = time.monotonic(), 0
    process = subprocess.Popen(command, cwd=folder)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        peak = max([peak, *(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))])
        time.sleep(0.005)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return Watched(peak, usage.ru_utime, time.monotonic() - began)


linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


@linux
@pytest.mark.slow
@pytest.mark.parametrize("name", ["ties", "dare_ties", "della", "tsv_m", "iso_c"])
def test_a_process_holds_no_more_than_its_budget_and_writes_the_same_bytes(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    least = budget.least(find_method(name), views(), 2)
    floor = merge(models["tiny"], tmp_path / "tiny.safetensors", "--method", name, "--threads", "2").anonymous
    outputs = set()
    for given in (least, least + 16 * MEGABYTE, 2 * least):
        output = tmp_path / "merged.safetensors"
        held = merge(models["large"], output, "--method", name, "--threads", "2", "--max-memory", f"{given}B").anonymous
        assert held - floor <= given, f"{(held - floor) / MEGABYTE:.0f} MB held, {given / MEGABYTE:.0f} MB given"
        outputs.add(output.read_bytes())
    assert len(outputs) == 1


@linux
@pytest.mark.slow
@pytest.mark.parametrize("name", ["average", "ties", "tsv_m"])
def test_one_thread_is_one_cores_worth_hashing_included(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    outputs = [tmp_path / f"{threads}.safetensors" for threads in (1, 3)]
    one = merge(models["large"], outputs[0], "--method", name, "--threads", "1")
    merge(models["large"], outputs[1], "--method", name, "--threads", "3")
    assert one.user <= 1.2 * one.wall
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
