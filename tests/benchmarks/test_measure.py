"""Processes are measured whole: how long, what they held, and beside a plain copy of what they write."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from measure import beside_copy, copy_seconds, run

HOLD = "import time; held = bytearray(b'x') * 64_000_000; time.sleep(0.3)"


def test_time_and_memory_of_a_process_and_its_children(tmp_path: Path) -> None:
    bare = run([sys.executable, "-c", "pass"], folder=tmp_path)
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLD + '; time.sleep(0.5)'!r}])"
    found = run([sys.executable, "-c", parent], folder=tmp_path)
    assert bare is not None
    assert found is not None
    assert bare["wall_s"] < 0.6 < found["wall_s"]
    assert bare["anon_mb"] < 60 < found["anon_mb"]


def test_what_takes_too_long_is_ended(tmp_path: Path) -> None:
    assert run([sys.executable, "-c", "import time; time.sleep(60)"], folder=tmp_path, limit=0.1) is None


def test_what_fails_ends_the_benchmark_with_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="status 3") as raised:
        run([sys.executable, "-c", "print('no such tensor'); raise SystemExit(3)"], folder=tmp_path)
    assert "no such tensor" in str(raised.value)


@pytest.mark.parametrize("folder", [False, True])
def test_a_copy_is_whole_and_removed(tmp_path: Path, folder: bool) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    if folder:
        source.mkdir()
    (source / "weights" if folder else source).write_bytes(bytes(1 << 20))
    assert 0 < copy_seconds(source, target) < 5
    assert not target.exists()


def test_all_sides_write_anew_and_count_beyond_the_first(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"weights")
    write = "import pathlib, time; place = pathlib.Path('out'); assert not place.exists(); "
    sides = {
        "start": [sys.executable, "-c", write],
        "slow": [sys.executable, "-c", write + "place.write_text('done'); time.sleep(0.4)"],
    }
    found, copy = beside_copy(sides, tmp_path / "out", tmp_path / "source", folder=tmp_path, turns=3)
    assert found.keys() == sides.keys()
    assert 0.3 < found["slow"]["beyond_start_s"] < 1.5
    assert found["slow"]["wall_s"] > found["start"]["wall_s"]
    assert "beyond_start_s" not in found["start"]
    assert 0 < copy < 1
