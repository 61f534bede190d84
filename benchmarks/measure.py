"""Whole processes, measured: wall and CPU seconds, and the most anonymous memory that they held."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import retex_cli

SAMPLE_SECONDS = 0.02
FAMILY_SECONDS = 0.25
"""How often children are looked for: that takes longer than a sample."""

COPY = "copy"
"""The plain copy that others are measured beside."""

RETEX = (sys.executable, "-m", "retex_cli")
"""The command line of the source tree at hand."""


def environment() -> dict[str, str]:
    """This environment, with the imported retex first on the path and without the network."""
    source = str(Path(retex_cli.__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": source, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def run(
    command: Sequence[str], *, folder: Path, limit: float = 3600.0, extra: Mapping[str, str] | None = None
) -> dict[str, float] | None:
    """``{"wall_s", "cpu_s", "anon_mb"}`` of a process and its children (1 MB is 10^6 bytes); None past ``limit`` s.

    Memory is anonymous memory, sampled every 20 ms: pages of files that the kernel keeps are nobody's. A process that
    fails ends this one with the last lines of what it said.
    """
    log = folder / "log"
    with log.open("wb") as output:
        started = time.monotonic()
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=folder, env={**environment(), **(extra or {})},
            start_new_session=True,
        )  # fmt: skip
        memory = _Memory(process.pid, started + limit)
        memory.start()  # beside: waiting here for the next sample would add to the time
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        memory.ended.set()
        memory.join()
    if memory.late:
        return None
    if status:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        sys.exit(f"{' '.join(command)} ended with status {process.returncode}:\n{tail}")
    return {"wall_s": seconds, "cpu_s": usage.ru_utime + usage.ru_stime, "anon_mb": memory.peak / 1e6}


def beside_copy(
    commands: Mapping[str, Sequence[str]], output: Path, source: Path, *, folder: Path, turns: int
) -> tuple[dict[str, dict[str, float]], float]:
    """What ``run`` says of each command, and seconds of a plain copy of ``source``, which all of them read, in turns,
    each right after another copy and written anew.

    The first command only plans what the others write into ``output``: with each stands the median of what it takes
    beyond the first of its turn, ``beyond_start_s``. Seconds are medians, memory is the most of all turns.
    """
    start, *others = commands
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    copies = []
    sides = [*commands, COPY]
    _remove(output)
    for turn in range(turns):
        for side in range(len(sides)):  # each turn begins with another: what is written last may have to wait
            name = sides[(turn + side) % len(sides)]
            copy_seconds(source, folder / COPY)  # each finds the source, and room for what it writes, in memory
            if name == COPY:
                copies.append(copy_seconds(source, folder / COPY))
                continue
            found = run(commands[name], folder=folder)
            assert found is not None
            runs[name].append(found)
            _remove(output)
    together = {
        name: {"anon_mb": max(each["anon_mb"] for each in found)}
        | {key: median(each[key] for each in found) for key in ("wall_s", "cpu_s")}
        for name, found in runs.items()
    }
    for name in others:
        beyond = (ours["wall_s"] - plan["wall_s"] for ours, plan in zip(runs[name], runs[start], strict=True))
        together[name]["beyond_start_s"] = median(beyond)
    return together, median(copies)


def copy_seconds(source: Path, target: Path) -> float:
    """A plain copy, ``cp`` and ``sync``, of a file or folder: on the disk when it ends, and removed."""
    files = [target / file.name for file in source.iterdir()] if source.is_dir() else [target]
    started = time.monotonic()
    subprocess.run(["sh", "-c", 'cp -r "$0" "$1" && shift && sync "$@"', source, target, *files], check=True)
    seconds = time.monotonic() - started
    _remove(target)
    return seconds


def _remove(output: Path) -> None:
    if output.is_dir():
        shutil.rmtree(output)
    output.unlink(missing_ok=True)


class _Memory(threading.Thread):
    """Samples ``peak``, the anonymous bytes of a process and its children, and ends them when they are ``late``."""

    def __init__(self, root: int, deadline: float) -> None:
        super().__init__(daemon=True)
        self.ended, self.peak, self.late = threading.Event(), 0, False
        self._root, self._deadline = root, deadline

    def run(self) -> None:
        """Until ``ended``."""
        family, looked = [self._root], time.monotonic()
        while not self.ended.wait(SAMPLE_SECONDS):
            now = time.monotonic()
            if now > self._deadline:
                self.late = True
                os.killpg(self._root, signal.SIGKILL)
                return
            if now - looked > FAMILY_SECONDS:
                family, looked = _family(self._root), now
            self.peak = max(self.peak, sum(map(_anonymous_bytes, family)))


def _family(root: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def _anonymous_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)
