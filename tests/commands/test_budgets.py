"""``--total-budget`` and ``--target``: a whole file's bytes, or what the experts must agree on, instead of a task's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import retex_cli
from retex_cli.commands import agreement, task_fit

if TYPE_CHECKING:
    from tests.conftest import Retex

OUT = "out.safetensors"


def recipe_of(path: str) -> dict[str, object]:
    with safe_open(path, "pt") as file:
        found: dict[str, object] = json.loads(file.metadata()["recipe"])
    return found


def bring_close(task: str, share: float) -> None:
    """Leave ``share`` of a task's offset from the merged model."""
    path = Path(f"experts/{task}/model.safetensors")
    merged, tensors = load_file("merged/model.safetensors"), load_file(path)
    for name in tensors:
        ours = merged.get(name.removeprefix("bert."))
        if ours is not None and ours.is_floating_point():
            tensors[name] = ours + share * (tensors[name] - ours)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_total_goes_where_it_is_needed(made: Path, retex: Retex) -> None:
    bring_close("dtd", 0.1)
    result = retex("fit-offsets", "--total-budget", "6KB", "-o", OUT, "--json")
    assert result.code == 0, result.err
    assert result.json["budget"] == "6KB for all tasks"
    cars, dtd = (result.json["tasks"][task] for task in ("cars", "dtd"))
    assert 5700 <= cars["offset_bytes"] + dtd["offset_bytes"] <= 6000
    assert cars["offset_bytes"] > 4 * dtd["offset_bytes"]
    assert dtd["budget_bytes"] < cars["budget_bytes"] <= 6000
    assert recipe_of(OUT)["budget"] == "6KB for all tasks"


def test_a_total_in_percent_is_of_all_experts(made: Path, retex: Retex) -> None:
    each = retex("fit-offsets", "--budget", "5%", "-o", OUT, "--json").json["tasks"]["cars"]["budget_bytes"]
    result = retex("fit-offsets", "--total-budget", "5%", "-o", "all.safetensors", "--json")
    total = sum(task["offset_bytes"] for task in result.json["tasks"].values())
    assert 0.95 * 2 * each < total <= 2 * each


def test_a_total_below_the_least_names_it(made: Path, retex: Retex) -> None:
    result = retex("fit-offsets", "--total-budget", "50", "-o", OUT)
    assert result.code == 1
    assert "the least that holds anything of every task is" in result.err
    least = result.err.rpartition("--total-budget ")[2].split()[0]
    assert retex("fit-offsets", "--total-budget", least, "-o", OUT).code == 0


def test_an_interrupted_total_goes_on(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from retex_cli.commands.fitting import Fitting

    experts = {"cars": "experts/cars", "dtd": "experts/dtd"}
    retex_cli.fit_offsets("merged", experts, "whole.safetensors", total_budget="6KB", device="cpu")
    code, coded = Fitting._code, []

    def broken(self: Fitting, fit: task_fit.TaskFit, prepared: object) -> None:
        if coded:
            raise KeyboardInterrupt
        coded.append(fit.task)
        code(self, fit, prepared)  # type: ignore[arg-type]

    monkeypatch.setattr(Fitting, "_code", broken)
    with pytest.raises(KeyboardInterrupt):
        retex_cli.fit_offsets("merged", experts, OUT, total_budget="6KB", device="cpu")
    monkeypatch.setattr(Fitting, "_code", code)
    retex_cli.fit_offsets("merged", experts, OUT, total_budget="6KB", device="cpu")
    assert Path(OUT).read_bytes() == Path("whole.safetensors").read_bytes()
    assert coded == ["cars"]


def test_the_target_is_met_by_the_smallest_file(made: Path, retex: Retex) -> None:
    result = retex("fit-offsets", "--target", "100", "-o", OUT, "--json")
    assert result.code == 0, result.err
    assert result.json["budget"] == "the smallest for 100 % agreement"
    found = recipe_of(OUT)
    for task, row in result.json["tasks"].items():
        assert row["agreement"] == {"share": 1.0, "inputs": 12, "resolution": 1 / 12}
        assert row["offset_bytes"] <= row["budget_bytes"]
        assert found["agreement"][task] == row["agreement"]  # type: ignore[index]
        assert len(found["inputs"][task]["sha256"]) == 64  # type: ignore[index]
    more = sum(row["offset_bytes"] for row in result.json["tasks"].values())
    result = retex("fit-offsets", "--target", "60", "-o", "less.safetensors", "--json")
    assert sum(row["offset_bytes"] for row in result.json["tasks"].values()) < more
    assert all(0.6 <= row["agreement"]["share"] <= 1 for row in result.json["tasks"].values())
    shown = retex("fit-offsets", "--target", "60", "-o", "less.safetensors", "--overwrite")
    assert "agreement with the expert" in shown.out
    assert "% of 12" in shown.out


def test_what_is_scored_is_what_recover_writes(made: Path, retex: Retex, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[dict[str, torch.Tensor]] = []
    load = agreement.ExpertModels.load_merged

    def spied(self: object, network: object, task: str, merged: dict[str, torch.Tensor]) -> None:
        loaded.append(dict(merged))
        load(self, network, task, merged)  # type: ignore[arg-type]

    monkeypatch.setattr(agreement.ExpertModels, "load_merged", spied)
    monkeypatch.setattr(agreement, "smallest", lambda code, score, *_: found_at(code, score, 3000))
    retex_cli.fit_offsets(
        "merged", {"cars": "experts/cars"}, OUT, target=0.5, inputs={"cars": "data/cars-inputs.jsonl"}, device="cpu"
    )
    assert retex("recover", "--offsets", OUT, "--task", "cars", "-o", "back.safetensors").code == 0
    back = load_file("back.safetensors")
    assert loaded[0]
    assert all(torch.equal(back[f"bert.{name}"], value) for name, value in loaded[0].items())


def found_at(code: object, score: object, budget: int) -> agreement.Found:
    data = code(budget)  # type: ignore[operator]
    return agreement.Found(data, budget, score(data))  # type: ignore[operator]


def test_a_target_out_of_reach_says_how_far_it_came(made: Path, retex: Retex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_fit, "LARGEST", "60")
    result = retex("fit-offsets", "--target", "100", "-o", OUT)
    assert result.code == 1
    assert "held-out inputs, not on 100 %" in result.err
    assert "% of 12" in result.err
    assert "lower --target" in result.err
    assert not Path(OUT).exists()


def test_a_task_that_is_added_may_have_a_target(made: Path, retex: Retex) -> None:
    arguments = ("--add", "pets=experts/dtd", "--target", "90", "--inputs", "pets=data/dtd-inputs.jsonl", "--json")
    result = retex("fit-offsets", "-o", "offsets.safetensors", *arguments)
    assert result.code == 0, result.err
    assert result.json["tasks"]["pets"]["agreement"]["share"] >= 0.9
    entry = recipe_of("offsets.safetensors")["experts"]["pets"]  # type: ignore[index]
    assert entry["agreement"]["share"] >= 0.9
    assert entry["budget"] == "the smallest for 90 % agreement"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--budget", "1%", "--target", "99"), "--budget and --target cannot stand together"),
        (("--total-budget", "1%", "--target", "99"), "--total-budget and --target cannot stand together"),
        (("--target", "0"), "--target 0 is no share of the inputs"),
        (("--target", "101"), "--target 101 is no share of the inputs"),
        (("--target", "99", "--lossless"), "--target and --lossless cannot stand together"),
        (("--add", "pets=experts/dtd", "--total-budget", "1%"), "--total-budget is for a whole file"),
        (("--expert", "pets=experts/dtd", "--target", "99"), "task 'pets' has no inputs"),
    ],
)
def test_what_cannot_be_meant(made: Path, retex: Retex, arguments: tuple[str, ...], words: str) -> None:
    output = "offsets.safetensors" if "--add" in arguments else OUT
    result = retex("fit-offsets", "-o", output, *arguments)
    assert result.code == 2
    assert words in result.err
