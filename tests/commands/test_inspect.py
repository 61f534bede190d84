from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from retex_cli.commands import inspect as command
from retex_cli.commands.inspect import InspectConfig, InspectReport
from retex_cli.errors import RetexError


def inspect(path: Path) -> InspectReport:
    return command.run(command.plan(InspectConfig(str(path))), None)


def test_tensors_whose_names_differ_in_numbers_are_one_group(tmp_path: Path) -> None:
    tensors = {f"layer.{i}.weight": torch.zeros(2, 3, dtype=torch.float16) for i in range(12)}
    tensors |= {
        "layer.0.bias": torch.zeros(3),
        "layer.1.bias": torch.zeros(4),
        "steps": torch.zeros(1, dtype=torch.int64),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt", "note": "mine"})
    found = inspect(tmp_path / "x.safetensors").to_json()
    groups = {group["name"]: group for group in found["groups"]}  # type: ignore[attr-defined]
    assert set(groups) == {"layer.*.weight", "layer.*.bias", "steps"}
    assert groups["layer.*.weight"] == {
        "name": "layer.*.weight",
        "tensors": 12,
        "parameters": 72,
        "bytes": 144,
        "shapes": [[2, 3]],
        "dtypes": ["F16"],
    }
    assert groups["layer.*.bias"]["shapes"] == [[3], [4]]
    assert (found["tensors"], found["parameters"], found["bytes"]) == (15, 80, 144 + 28 + 8)
    assert found["dtypes"] == {"F16": 12, "F32": 2, "I64": 1}
    assert (found["format"], found["recipe"], found["tasks"]) == ("checkpoint", {}, {})
    assert found["metadata"] == {"note": "mine"}
    assert found["files"] == {"x.safetensors": (tmp_path / "x.safetensors").stat().st_size}


def test_many_groups_are_shortened_until_they_can_be_read(tmp_path: Path) -> None:
    names = [f"block.{i}.{word}{n}.weight" for i in range(2) for word in "ab" for n in range(30)]
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "x.safetensors")
    groups = inspect(tmp_path / "x.safetensors").groups
    assert [(group.name, group.tensors) for group in groups] == [("block.*.…", 120)]


def test_a_recipe_in_the_header_is_told(tmp_path: Path) -> None:
    recipe = {"command": "merge", "experts": {"cars": {"sha256": "ab" * 32}}, "revision": None}
    for prefix in ("", "retex."):
        metadata = {
            f"{prefix}format": "retex.merged",
            f"{prefix}format_version": "1",
            ("retex.version" if prefix else "retex_version"): "9.9",
            f"{prefix}recipe": json.dumps(recipe),
        }
        save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", metadata=metadata)
        report = inspect(tmp_path / "x.safetensors")
        found = report.to_json()
        assert found["recipe"] == recipe
        assert (found["format"], found["format_version"], found["retex_version"]) == ("retex.merged", "1", "9.9")
        lines = report.lines()
        assert lines[2:] == [
            "made by retex 9.9:",
            "  command: merge",
            "  experts:",
            "    cars:",
            "      sha256: abababababab…",
        ]


def test_a_foreign_header_does_not_stop_an_inspection(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", metadata={"recipe": "of my grandmother"})
    assert inspect(tmp_path / "x.safetensors").recipe == {}


def test_tasks_of_an_offsets_file(tmp_path: Path) -> None:
    tasks = {"cars": {"expert": "org/cars", "revision": None, "budget_bytes": 7, "expert_bytes": 100}, "dtd": {}}
    tensors = {
        "offsets/cars": torch.zeros(5, dtype=torch.uint8),
        "offsets/dtd": torch.zeros(6, dtype=torch.uint8),
        "tensors/cars/head.weight": torch.zeros(2),
        "rows/cars/embeddings": torch.zeros(3),
        "files/abc": torch.zeros(9, dtype=torch.uint8),
        "digests": torch.zeros(2, 8, dtype=torch.uint8),
    }
    metadata = {"format": "retex.offsets", "format_version": "1", "tasks": json.dumps(tasks)}
    save_file(tensors, tmp_path / "x.safetensors", metadata=metadata)
    report = inspect(tmp_path / "x.safetensors")
    assert report.tasks == {
        "cars": {"offsets": 5, "task tensors": 20, "budget": 7, "expert size": 100, "expert": "org/cars"},
        "dtd": {"offsets": 6},
    }
    (table,) = report.tables()
    assert len(table.rows) == 2
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_a_lora_adapter_can_be_looked_at(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"base.a.lora_A.weight": torch.zeros(2, 4)}, tmp_path / "adapter_model.safetensors")
    assert inspect(tmp_path).files.keys() == {"adapter_model.safetensors"}


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(RetexError, match=r"x\.safetensors"):
        inspect(tmp_path / "x.safetensors")
