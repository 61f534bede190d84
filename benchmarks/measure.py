"""Whole processes, measured: wall and CPU seconds, and the most anonymous memory that they held."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import retex_cli

SAMPLE_SECONDS = 0.02
FAMILY_SECONDS = 0.25
"""How often children are looked for: that takes longer than a sample."""

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
        family, looked, peak = [process.pid], started, 0.0
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            now = time.monotonic()
            if pid:
                break
            if now - started > limit:
                os.killpg(process.pid, signal.SIGKILL)
                os.wait4(process.pid, 0)
                return None
            if now - looked > FAMILY_SECONDS:
                family, looked = _family(process.pid), now
            peak = max(peak, sum(map(_anonymous_bytes, family)))
            time.sleep(SAMPLE_SECONDS)
    if status:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        sys.exit(f"{' '.join(command)} ended with status {os.waitstatus_to_exitcode(status)}:\n{tail}")
    return {"wall_s": now - started, "cpu_s": usage.ru_utime + usage.ru_stime, "anon_mb": peak / 1e6}


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
