"""What only a real process can show: pipes, signals, and commands typed one after another with nothing else."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load, save_file

RETEX = (sys.executable, "-m", "retex_cli")


def start(*arguments: str) -> subprocess.Popen[bytes]:
    """A process with the usual Ctrl-C: what a shell starts in the background ignores it, and so do its children."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*RETEX, *arguments], **pipes, preexec_fn=_heed_ctrl_c)


def _heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_weights_through_a_pipe(workspace: Path) -> None:
    with start("merge", "-o", "-") as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert "embeddings.word_embeddings.weight" in load(out), "standard output holds the weights and nothing else"
    assert b"39 of 39 tensors" in err, "and the report goes where it does no harm"
    assert not (workspace / "merged").exists()


def test_a_reader_that_goes_away_is_an_error_in_words(workspace: Path) -> None:
    with start("merge", "-o", "-", "--quiet") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(8)
        process.stdout.close()
        err = process.stderr.read().decode()
        assert process.wait() == 1
    assert "Traceback" not in err
    assert err.startswith("error: ")


def test_ctrl_c_ends_with_130_and_no_traceback(tmp_path: Path) -> None:
    for name in ("base", "a"):  # more than a pipe holds, so that it cannot be over before the signal
        save_file({"w": torch.zeros(1 << 20)}, tmp_path / f"{name}.safetensors")
    base, expert = str(tmp_path / "base.safetensors"), f"a={tmp_path}/a.safetensors"
    with start("merge", "--base", base, "--expert", expert, "-o", "-") as process:
        assert process.stdout is not None
        process.stdout.read(8)  # it is at work, and waits for us to read on
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in err.decode()
    assert err.decode().splitlines()[-1] == "error: interrupted"
