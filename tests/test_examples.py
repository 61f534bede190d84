"""The examples are run as they stand, on a workspace of tiny real models with a task called cars."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open

EXAMPLES = Path(__file__).parent.parent / "examples"
CARD = ("retex merge --method ties", "retex recover --task cars -o cars.safetensors")


@pytest.fixture
def shell(tmp_path: Path) -> Mapping[str, str]:
    """An environment in which ``retex`` and ``python3`` are those of this interpreter."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = Path(sys.executable).with_name("retex")
    calls = f'exec "{sys.executable}" -m retex_cli "$@"' if not script.exists() else f'exec "{script}" "$@"'
    for name, line in (("retex", calls), ("python3", f'exec "{sys.executable}" "$@"')):
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def tensors(path: Path) -> dict[str, bytes]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118


def test_pipeline(workspace: Path, shell: Mapping[str, str]) -> None:
    script = EXAMPLES / "pipeline.sh"
    for line in CARD:
        assert line in script.read_text().splitlines(), "the design card's lines stand as they are"
    done = subprocess.run(["bash", script, "90"], capture_output=True, text=True, check=False, env=shell)
    assert done.returncode == 0, done.stderr
    cost, made, recovered = done.stdout.splitlines()[-3:]
    fitted = json.loads((workspace / "fit-offsets.json").read_text())
    assert cost == f"cars costs {fitted['tasks']['cars']['offset_bytes']} bytes"
    assert made == "made by recover"
    assert recovered.startswith("recovered: ")
    streamed = (workspace / "cars.sha256").read_text().strip()
    assert streamed == hashlib.sha256((workspace / "cars.safetensors").read_bytes()).hexdigest()
    scores = json.loads((workspace / "eval.json").read_text())
    assert set(scores["tasks"]) == {"cars", "dtd"}
    assert (
        tensors(workspace / "cars.safetensors").keys() == tensors(workspace / "experts/cars/model.safetensors").keys()
    )


@pytest.fixture
def pretend(tmp_path: Path, shell: Mapping[str, str], monkeypatch: pytest.MonkeyPatch):
    """Run a piece of shell where ``retex`` only prints an object and ends with a status."""
    monkeypatch.chdir(tmp_path)
    stub = "#!/bin/sh\nprintf '%s' \"$STUB\"\nexit $STATUS\n"
    (tmp_path / "bin" / "retex").write_text(stub)

    def run(script: str, status: int, said: object, **more: str) -> subprocess.CompletedProcess[str]:
        env = {**shell, "STUB": json.dumps(said), "STATUS": str(status), **more}
        command = ["bash", "-eo", "pipefail", "-c", script]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=env)

    return run


ENDS = ((0, {"mean": {"normalised": {"K": 0.995}}}), (3, {"error": "mean under K"}), (1, {"error": "no such file"}))


def test_pipeline_tells_worse_from_broken(pretend) -> None:
    """Only the last part of the script: what comes before is run for real above."""
    text = (EXAMPLES / "pipeline.sh").read_text()
    script = text[: text.index("# Every command")] + text[text.index("# The exit status") :]
    good, worse, broken = (pretend(script, status, said) for status, said in ENDS)
    assert [done.returncode for done in (good, worse, broken)] == [0, 3, 1]
    assert good.stdout == "recovered: 0.995 of the experts' accuracy\n"
    assert worse.stderr == "not good enough: mean under K\n"
    assert broken.stderr == "broken: no such file\n"


def test_ci_job(workspace: Path, retex) -> None:
    job = yaml.safe_load((EXAMPLES / "ci.yml").read_text())["jobs"]["merge"]
    install, *calls, evaluate = [step["run"] for step in job["steps"] if "run" in step]
    assert install == "pip install retex-cli"
    assert {*CARD} <= {*calls}
    for line in (*calls, evaluate.splitlines()[1].partition(" > ")[0].replace('"$GATE"', "90")):
        word, *arguments = line.split()
        assert word == "retex"
        result = retex(*arguments)
        assert result.code == 0, result.err
    (workspace / "eval.json").write_text(result.out)
    upload = job["steps"][-1]["with"]["path"].split()
    assert [name for name in upload if not (workspace / name).exists()] == [], "everything it keeps is there"


def test_ci_job_tells_worse_from_broken(pretend) -> None:
    job = yaml.safe_load((EXAMPLES / "ci.yml").read_text())["jobs"]["merge"]
    (evaluate,) = [step["run"] for step in job["steps"] if step.get("name") == "Evaluate"]
    ends = [pretend(evaluate, status, said, GATE=job["env"]["GATE"]) for status, said in ENDS]
    assert [done.returncode for done in ends] == [0, 3, 1]
    assert ["::error::" in done.stdout for done in ends] == [False, True, False]


def test_python_api(workspace: Path, shell: Mapping[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / "python_api.py", "."], capture_output=True, text=True, check=False, env=shell
    )
    assert done.returncode == 0, done.stderr
    assert "merging" in done.stdout
    assert "recovered, protocol K" in done.stdout
    assert "switched to dtd" in done.stdout
    assert "no task 'boats'" in done.stdout.splitlines()[-1]
    for task in ("cars", "dtd"):
        names = tensors(workspace / f"recovered/{task}/model.safetensors").keys()
        assert names == tensors(workspace / f"experts/{task}/model.safetensors").keys()
