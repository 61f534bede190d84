"""The bars tell a miss from a pass, and models in shards are the models."""

from __future__ import annotations

from pathlib import Path

import offsets_speed
import pytest
import shapes
import torch

from retex_cli.io.checkpoint import open_checkpoint

GOOD: dict[str, object] = {
    "fit": {"0.1%": {"wall_s": 100.0, "anon_mb": 900.0}},
    "recover": {"0.1%": {"beyond_start_s": 2.4}},
    "copy_s": 1.6,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"fit": {"0.1%": {"wall_s": 181.0, "anon_mb": 900.0}}}, ["fit within 0.1%: 181 s, not 180"]),
        ({"fit": {"0.1%": {"wall_s": 1.0, "anon_mb": 2001.0}}}, ["2001 MB of anonymous memory, not 2000"]),
        ({"recover": {"0.1%": {"beyond_start_s": 2.5}}}, ["recover within 0.1%: 1.56 copies beyond a start, not 1.5"]),
    ],
)
def test_a_missed_bar_is_told(change: dict[str, object], words: list[str]) -> None:
    found = offsets_speed.missed("gpt2", {**GOOD, **change})
    assert len(found) == len(words)
    assert all(word in line for word, line in zip(words, found, strict=True))


def test_shards_hold_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.LLAMAS, "llama-1b", shapes.Llama(16, 24, 8, 2))
    count = shapes.make(tmp_path / "whole", "llama-1b", 2, 1, torch.bfloat16)
    assert shapes.make(tmp_path / "parts", "llama-1b", 2, 1, torch.bfloat16, 300_000) == count
    for name in ("base", "expert0"):
        whole, parts = open_checkpoint(tmp_path / "whole" / name), open_checkpoint(tmp_path / "parts" / name)
        assert len(whole.files) == 1
        assert len(parts.files) > 2
        assert sum(info.numel for info in parts.tensors.values()) == count
        assert all(torch.equal(whole.read(tensor), parts.read(tensor)) for tensor in whole.tensors)
    base = open_checkpoint(tmp_path / "whole/base").read("model.norm.weight")
    assert not torch.equal(base, open_checkpoint(tmp_path / "whole/expert0").read("model.norm.weight"))
