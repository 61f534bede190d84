"""What several tasks' offsets have in common: coded once, used by all, and left out where there is nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import retex_cli
from retex_cli import RetexError
from retex_cli.commands import common, guard
from retex_cli.commands.offsets_file import OffsetsFile
from retex_cli.io.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from tests.conftest import Retex

FILE = "offsets.safetensors"


@pytest.fixture
def displaced(made: Path, retex: Retex) -> Path:
    """The workspace, its merged checkpoint far from the middle of the experts, and offsets fitted to it."""
    path = made / "merged/model.safetensors"
    weights, draw = load_file(path), torch.Generator().manual_seed(0)
    for name, tensor in weights.items():
        if tensor.ndim == 2:
            left, right = (torch.randn(size, 2, generator=draw) for size in tensor.shape)
            weights[name] = tensor + 0.05 * left @ right.T
    save_file(weights, path, metadata={"format": "pt"})
    result = retex("fit-offsets", "--overwrite", "--without", "compare")
    assert result.code == 0, result.err
    return made


def header(path: str = FILE) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def recovered(retex: Retex, task: str, offsets: str = FILE) -> dict[str, Tensor]:
    result = retex("recover", "--task", task, "--offsets", offsets, "-o", "back.safetensors", "--overwrite")
    assert result.code == 0, result.err
    return load_file("back.safetensors")


def distance(found: Mapping[str, Tensor], task: str) -> float:
    """Relative, over all tensors."""
    expert = load_file(f"experts/{task}/model.safetensors")
    missing = sum(float((found[name] - tensor).square().sum()) for name, tensor in expert.items())
    return missing / sum(float(tensor.square().sum()) for tensor in expert.values())


def test_it_is_stored_once_and_counts_within_the_budget(displaced: Path, retex: Retex) -> None:
    result = retex("fit-offsets", "--overwrite", "--without", "compare", "--json", "--budget", "4KB")
    tensors, tasks = load_file(FILE), json.loads(header()["tasks"])
    assert header()["format_version"] == "3"
    assert header()["common"] == hashlib.sha256(tensors["common"].numpy().tobytes()).hexdigest()
    share = len(tensors["common"]) / 2
    for task in ("cars", "dtd"):
        row = result.json["tasks"][task]
        assert tasks[task]["common"] is True
        assert row["offset_bytes"] == pytest.approx(len(tensors[f"offsets/{task}"]) + share, abs=1)
        assert row["offset_bytes"] <= row["budget_bytes"] <= 4000
    assert share > 500


@pytest.mark.parametrize("budget", [("--budget", "5%"), ("--total-budget", "5%")])
def test_the_same_bytes_bring_experts_nearer(displaced: Path, retex: Retex, budget: tuple[str, str]) -> None:
    given = ("--overwrite", *budget, "--json")
    with_it = retex("fit-offsets", *given, "--without", "compare")
    near = [distance(recovered(retex, task), task) for task in ("cars", "dtd")]
    without = retex("fit-offsets", *given, "--without", "compare", "--without", "common")
    far = [distance(recovered(retex, task), task) for task in ("cars", "dtd")]
    assert "common" not in header()
    assert header()["format_version"] == "1"
    assert sum(near) < 0.9 * sum(far)
    used = [sum(row["offset_bytes"] for row in each.json["tasks"].values()) for each in (with_it, without)]
    assert used[0] <= sum(row["budget_bytes"] for row in without.json["tasks"].values())


def test_where_it_would_not_go_far_tasks_aim_at_how_they_differ(
    displaced: Path, retex: Retex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "FAR", 1.1)
    result = retex("fit-offsets", "--overwrite", "--without", "compare", "--budget", "30%")
    assert "common to them: it is left out" in result.err
    assert "common" not in load_file(FILE)
    assert header()["format_version"] == "1"
    merged, found = load_file("merged/model.safetensors"), recovered(retex, "cars")
    experts = {task: load_file(f"experts/{task}/model.safetensors") for task in ("cars", "dtd")}
    name = "encoder.layer.1.output.dense.weight"
    cars, dtd = (expert[f"bert.{name}"] for expert in experts.values())
    own, offset = (cars - dtd) / 2, found[f"bert.{name}"] - merged[name]
    assert float((offset - own).norm()) < 0.1 * float(own.norm())
    assert float((found[f"bert.{name}"] - cars).norm()) > float(own.norm()), "where merged lies stays as it was"


def test_experts_of_an_average_have_nothing_in_common(made: Path) -> None:
    assert "common" not in load_file(FILE)
    assert header()["format_version"] == "1"


def test_without_lead_it_is_not_lengthened_either(displaced: Path, retex: Retex) -> None:
    lengthened = load_file(FILE)["common"]
    assert retex("fit-offsets", "--overwrite", "--without", "compare", "--without", "lead").code == 0
    assert not torch.equal(load_file(FILE)["common"], lengthened)


def test_a_switched_model_has_the_bits_of_a_recovered_file(displaced: Path, retex: Retex) -> None:
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained("experts/cars")
    retex_cli.Predictor.load("merged", FILE, device="cpu").apply_(model, "cars")
    found = recovered(retex, "cars")
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in found.items())
    merged = load_file("merged/model.safetensors")
    assert any(not torch.equal(found[f"bert.{name}"], tensor) for name, tensor in merged.items())


def test_a_mix_has_it_once(displaced: Path, retex: Retex) -> None:
    cars, dtd = recovered(retex, "cars"), recovered(retex, "dtd")
    assert retex("recover", "--mix", "cars=0.5,dtd=0.5", "-o", "mix.safetensors").code == 0
    mix, name = load_file("mix.safetensors"), "bert.encoder.layer.0.attention.self.query.weight"
    torch.testing.assert_close(mix[name], (cars[name] + dtd[name]) / 2)


def test_a_task_that_is_added_uses_it_and_changes_nothing_else(displaced: Path, retex: Retex) -> None:
    before, near = load_file(FILE), distance(recovered(retex, "dtd"), "dtd")
    assert retex("fit-offsets", "--remove", "dtd").code == 0
    assert torch.equal(load_file(FILE)["common"], before["common"])
    assert retex("fit-offsets", "--add", "dtd=experts/dtd", "--without", "compare").code == 0
    after = load_file(FILE)
    for name in ("common", "offsets/cars"):
        assert torch.equal(after[name], before[name])
    assert distance(recovered(retex, "dtd"), "dtd") <= near


def test_a_lossless_task_is_exact_beside_it_and_it_goes_with_its_last_user(displaced: Path, retex: Retex) -> None:
    changes = ("--remove", "cars", "--remove", "dtd", "--add", "exact=experts/cars", "--lossless")
    assert retex("fit-offsets", "--add", "exact=experts/cars", "--lossless").code == 0
    expert = load_file("experts/cars/model.safetensors")
    found = recovered(retex, "exact")
    assert all(torch.equal(found[name], tensor) for name, tensor in expert.items())
    assert header()["format_version"] == "3"
    assert retex("fit-offsets", *changes[:4]).code == 0
    assert "common" not in load_file(FILE)
    assert header()["format_version"] == "2"
    assert "common" not in header()


def test_where_it_is_damaged_tasks_without_it_still_come_back(displaced: Path, retex: Retex) -> None:
    assert retex("fit-offsets", "--add", "exact=experts/cars", "--lossless").code == 0
    tensors, metadata = load_file(FILE), header()
    tensors["common"][len(tensors["common"]) // 2] ^= 1
    save_file(tensors, FILE, metadata=metadata)
    result = retex("recover", "--task", "cars", "-o", "cars.safetensors")
    assert result.code == 1
    assert (
        f"{FILE}: the offsets that its tasks have in common are damaged: their SHA-256 is not the header's"
        in result.err
    )
    assert recovered(retex, "exact")
    del tensors["common"]
    save_file(tensors, FILE, metadata=metadata)
    with open_checkpoint("merged") as merged, pytest.raises(RetexError, match="they are not there"):
        OffsetsFile(FILE, merged).factors("dtd")


def test_a_task_that_is_best_left_merged_does_without(
    displaced: Path, retex: Retex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "MADE", guard._Doubt(smaller=1e9, merged=1e-9, errors=-1e9))
    assert retex("fit-offsets", "--overwrite").code == 0
    assert not any("common" in record for record in json.loads(header()["tasks"]).values())
    assert "common" not in load_file(FILE)
    merged, found = load_file("merged/model.safetensors"), recovered(retex, "cars")
    assert all(torch.equal(found[f"bert.{name}"], tensor) for name, tensor in merged.items() if tensor.ndim == 2)


def test_an_interrupted_fit_does_not_look_for_it_again(
    displaced: Path, retex: Retex, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path(FILE).read_bytes()
    calls: list[int] = []
    within = common._Mean.within

    def counted(self: common._Mean, budget: int, progress: retex_cli.progress.Progress) -> bytes:
        calls.append(budget)
        return within(self, budget, progress)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(common._Mean, "within", counted)
    with monkeypatch.context() as patched:
        patched.setattr("retex_cli.commands.fit_offsets.write_artefact", interrupted)
        assert retex("fit-offsets", "--overwrite", "--without", "compare").code == 130
    assert retex("fit-offsets", "--overwrite", "--without", "compare").code == 0
    assert len(calls) == 1
    assert Path(FILE).read_bytes() == whole


def test_inspect_shows_it(displaced: Path, retex: Retex) -> None:
    result = retex("inspect", FILE, "--json")
    assert result.json["tasks"]["cars"]["in common"] == len(load_file(FILE)["common"])


@pytest.mark.parametrize("shape", [(), (0,), (7,), (0, 3), (3, 0), (40, 300), (4, 3, 5, 5)])
def test_energies_are_squared_norms_of_tensors_of_any_shape(shape: tuple[int, ...]) -> None:
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert common._energy(delta) == pytest.approx(float(delta.double().square().sum()), rel=1e-5)
