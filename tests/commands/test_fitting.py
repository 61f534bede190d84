"""A fit that is interrupted goes on from its finished tensors, and one that is not leaves nothing behind."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import retex_cli
from retex_cli import RetexError
from retex_cli.commands import fitting
from retex_cli.io.artefact import Stored
from retex_cli.offsets import lossless
from retex_cli.offsets.fit import OffsetFitter, Prepared

if TYPE_CHECKING:
    from tests.conftest import Retex

EXPERTS = {"cars": "experts/cars", "dtd": "experts/dtd"}


class Interrupting:
    """Counts the tensors that are prepared, and stops the process as Ctrl-C does before the one after ``last``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, last: int) -> None:
        self.count, self.last, self._lock = 0, last, threading.Lock()
        prepare = OffsetFitter.prepare

        def counted(fitter: OffsetFitter, delta: torch.Tensor, rank: int | None = None) -> Prepared:
            with self._lock:
                if self.count == self.last:
                    raise KeyboardInterrupt
                self.count += 1
            return prepare(fitter, delta, rank)

        monkeypatch.setattr(OffsetFitter, "prepare", counted)


def fit(output: str, **options: object) -> None:
    retex_cli.fit_offsets("merged", EXPERTS, output, **{"budget": "5%", "device": "cpu", **options})  # type: ignore[arg-type]


def left_behind() -> list[Path]:
    return list(Path().glob(".*parts"))


@pytest.mark.parametrize("exact", [False, True])
def test_an_interrupted_fit_goes_on(made: Path, monkeypatch: pytest.MonkeyPatch, exact: bool) -> None:
    whole = Interrupting(monkeypatch, -1)
    fit("whole.safetensors", lossless=exact)
    assert left_behind() == []
    monkeypatch.undo()
    monkeypatch.chdir(made)
    broken = Interrupting(monkeypatch, whole.count - 3)
    with pytest.raises(KeyboardInterrupt):
        fit("again.safetensors", lossless=exact)
    assert not Path("again.safetensors").exists()
    assert len(left_behind()) == 1
    broken.last = -1
    fit("again.safetensors", lossless=exact)
    assert whole.count <= broken.count <= whole.count + 2, "all but what two threads had in hand is used again"
    assert left_behind() == []
    assert Path("again.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()


def test_other_options_begin_anew(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Interrupting(monkeypatch, 20)
    with pytest.raises(KeyboardInterrupt):
        fit("again.safetensors")
    broken.last = -1
    fit("again.safetensors", budget="6%")
    other = broken.count
    broken.count = 0
    fit("fresh.safetensors", budget="6%")
    assert other == 20 + broken.count
    assert left_behind() == []


def test_a_change_of_the_expert_begins_anew(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Interrupting(monkeypatch, 20)
    with pytest.raises(KeyboardInterrupt):
        fit("again.safetensors")
    path = Path("experts/cars/model.safetensors")
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    broken.last = -1
    fit("again.safetensors")
    broken.count = 0
    fit("fresh.safetensors")
    assert Path("again.safetensors").read_bytes() == Path("fresh.safetensors").read_bytes()


def test_a_refusal_leaves_nothing(made: Path) -> None:
    with pytest.raises(RetexError, match="the least that holds anything"):
        fit("again.safetensors", budget="3")
    assert left_behind() == []


def test_an_interrupted_correction_goes_on(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, calls = lossless.encode, []

    def broken(*arguments: object) -> bytes:
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return encode(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(lossless, "encode", broken)
    with pytest.raises(KeyboardInterrupt):
        fit("again.safetensors", lossless=True)
    fit("again.safetensors", lossless=True)
    resumed = len(calls)
    calls[:] = [1] * 20
    fit("fresh.safetensors", lossless=True)
    assert resumed <= len(calls) - 20 + 3
    assert Path("again.safetensors").read_bytes() == Path("fresh.safetensors").read_bytes()


def test_what_waits_for_the_file_waits_on_disk(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[fitting.FittedTask] = []
    task = fitting.Fitting._task

    def spied(self: fitting.Fitting, fit: object) -> fitting.FittedTask:
        seen.append(task(self, fit))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(fitting.Fitting, "_task", spied)
    fit("out.safetensors", lossless=True)
    assert len(seen) == 2
    assert all(isinstance(tensor, Stored) for fitted in seen for tensor in fitted.tensors.values())


def test_the_budget_of_the_file_goes_before_the_automatic_one(made: Path, retex: Retex) -> None:
    result = retex("fit-offsets", "--lossless", "-o", "out.safetensors", "--json")
    assert result.json["budget"] == "5%"
    assert "budget = '5%' is used; without it --lossless chooses one" in result.err
    Path("retex.toml").write_text(
        "\n".join(line for line in Path("retex.toml").read_text().splitlines() if "budget" not in line)
    )
    result = retex("fit-offsets", "--lossless", "-o", "out.safetensors", "--overwrite")
    assert "budget of each task: smallest total" in result.out
    result = retex("fit-offsets", "--lossless", "--budget", "3%", "-o", "out.safetensors", "--overwrite")
    assert "budget of each task: 3%" in result.out
