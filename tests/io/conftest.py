"""Small checkpoints on disk, written by the safetensors library and not by the code under test."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import pytest
import torch
from safetensors.torch import save_file


class MakeModel(Protocol):
    def __call__(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        config: Mapping[str, object] | None = None,
        file: str = "model.safetensors",
    ) -> Path: ...


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """A model folder below ``tmp_path`` with one weight file and, if given, a config."""

    def make(
        name: str,
        tensors: Mapping[str, torch.Tensor],
        config: Mapping[str, object] | None = None,
        file: str = "model.safetensors",
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        if file.endswith(".safetensors"):
            save_file(dict(tensors), folder / file, metadata={"format": "pt"})
        else:
            torch.save(dict(tensors), folder / file)
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder

    return make
