"""Every method on every kind of tensor: linear, fused, convolution, BatchNorm, grown vocabulary, mixed types."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from retex_cli.commands.merge import MergeConfig, plan, run
from retex_cli.merging.table import METHODS

SHAPES = {
    "embed_tokens.weight": (30, 12),
    "layers.0.attention.qkv.weight": (36, 12),
    "layers.0.attention.qkv.bias": (36,),
    "layers.0.mlp.up.weight": (24, 12),
    "layers.0.mlp.down.weight": (12, 24),
    "layers.1.conv.weight": (8, 4, 3, 3),
    "layers.1.depthwise.weight": (8, 1, 3, 3),
    "layers.1.bn.weight": (8,),
    "layers.1.bn.bias": (8,),
    "layers.1.bn.running_mean": (8,),
    "layers.1.bn.running_var": (8,),
    "layers.1.scale": (),
    "norm.weight": (12,),
}
COUNT = "layers.1.bn.num_batches_tracked"
TYPES = {"half": torch.float16, "brain": torch.bfloat16}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A base in float32 and experts in other types, one of them with three tokens more."""
    folder = tmp_path_factory.mktemp("models")
    draw = torch.Generator().manual_seed(0)
    base = {name: torch.rand(shape, generator=draw) + 0.1 for name, shape in SHAPES.items()}
    save_file({**base, COUNT: torch.tensor(7)}, folder / "base.safetensors")
    for task, dtype in TYPES.items():
        expert = {name: weights + 0.02 * torch.randn(weights.shape, generator=draw) for name, weights in base.items()}
        if task == "brain":
            expert["embed_tokens.weight"] = torch.cat([expert["embed_tokens.weight"], torch.ones(3, 12)])
        stored = {name: weights.to(dtype) for name, weights in expert.items()}
        save_file({**stored, COUNT: torch.tensor(9)}, folder / f"{task}.safetensors")
    return folder / "base.safetensors", {task: folder / f"{task}.safetensors" for task in TYPES}


def merged_by(method: str, models: tuple[Path, dict[str, Path]], output: Path, **settings: object) -> dict[str, Tensor]:
    base, experts = models
    config = MergeConfig(
        base=str(base),
        experts={task: str(path) for task, path in experts.items()},
        output=str(output),
        method=method,
        device="cpu",
        threads=1,
        **settings,  # type: ignore[arg-type]
    )
    run(plan(config))
    return load_file(output)


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if not row.needs_inputs])
def test_every_tensor_comes_out_of_every_method(
    method: str, models: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    base, experts = load_file(models[0]), [load_file(path) for path in models[1].values()]
    merged = merged_by(method, models, tmp_path / "merged.safetensors")
    assert {name: (tuple(w.shape), w.dtype) for name, w in merged.items()} == {
        **{name: (shape, torch.float32) for name, shape in SHAPES.items()},
        COUNT: ((), torch.int64),
    }
    assert merged[COUNT] == 7
    for name in SHAPES:
        assert merged[name].isfinite().all(), name
        assert (merged[name] - base[name]).abs().max() < 1, f"{name} stays near the base"
    for name in ("layers.1.bn.running_mean", "layers.1.bn.running_var"):
        mean = torch.stack([expert[name].float() for expert in experts]).mean(0)
        torch.testing.assert_close(merged[name], mean)
    changed = [name for name in SHAPES if not torch.equal(merged[name], base[name])]
    assert {"layers.0.mlp.up.weight", "layers.1.conv.weight"} <= set(changed)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("method", ["ties", "tsv_m", "iso_cts", "knots", "doge"])
def test_the_output_can_be_of_another_type(
    method: str, dtype: str, models: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    whole = merged_by(method, models, tmp_path / "whole.safetensors")
    short = merged_by(method, models, tmp_path / "short.safetensors", dtype=dtype)
    for name in SHAPES:
        assert torch.equal(short[name], whole[name].to(getattr(torch, dtype))), name


@pytest.mark.parametrize("method", ["knots", "tsv_m", "iso_c"])
def test_adapters_are_merged_from_their_factors_as_whole_experts_are(method: str, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(1)
    base = {"layer.q.weight": torch.zeros(24, 16), "norm.weight": torch.ones(16)}
    save_file(base, tmp_path / "base.safetensors")
    adapters, dense = {}, {}
    for task in ("a", "b"):
        a, b = torch.randn(2, 16, generator=draw), torch.randn(24, 2, generator=draw)
        folder = tmp_path / task
        folder.mkdir()
        key = "base_model.model.layer.q.lora_"
        save_file({key + "A.weight": a, key + "B.weight": b}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 4}))
        save_file({**base, "layer.q.weight": 2 * b @ a}, tmp_path / f"{task}.safetensors")
        adapters[task], dense[task] = folder, tmp_path / f"{task}.safetensors"
    found, wanted = (
        merged_by(method, (tmp_path / "base.safetensors", each), tmp_path / name, allow_unrelated=True)
        for name, each in (("found.safetensors", adapters), ("wanted.safetensors", dense))
    )
    assert (found["layer.q.weight"] - wanted["layer.q.weight"]).norm() < 1e-5 * wanted["layer.q.weight"].norm()
    assert torch.equal(found["norm.weight"], base["norm.weight"])
