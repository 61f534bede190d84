"""LiNeS: depth from names, scales from the paper."""

from __future__ import annotations

import torch

from retex_cli.merging.depth import block_of, depths, kind_of
from retex_cli.merging.memory import merge_tensors

NAMES = ["embed.weight", "layer.0.w", "layer.1.w", "layer.2.w", "head.w"]


def models() -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    one, two, three = ({name: torch.full((3,), value) for name in NAMES} for value in (1.0, 2.0, 3.0))
    return one, {"a": two, "b": three}


def test_depth_counts_blocks_within_each_stack() -> None:
    found = depths(["wte.weight", "encoder.block.0.w", "encoder.block.4.x.1.w", "decoder.block.2.w", "h.0.w"])
    assert found == {
        "wte.weight": None,
        "encoder.block.0.w": 0.0,
        "encoder.block.4.x.1.w": 1.0,
        "decoder.block.2.w": 1.0,
        "h.0.w": 0.0,
    }
    assert block_of("12.weight") == ("", 12)
    assert block_of("layer12.weight") is None
    assert kind_of("h.3.mlp.1.w") == "h.*.mlp.*.w"


def test_scales_worked_by_hand() -> None:
    """Task vectors 1 and 2, summed to 3; scaled by 0.2 outside and first, 0.2 + 0.6 / 2 in the middle, 0.8 last."""
    base, experts = models()
    options = {"alpha": 1, "lines": 0.6, "lines_alpha": 0.2}
    merged = merge_tensors("task_arithmetic", base, experts, options)
    scales = [(merged[name][0].item() - 1) / 3 for name in NAMES]
    torch.testing.assert_close(torch.tensor(scales), torch.tensor([0.2, 0.2, 0.5, 0.8, 0.2]))


def test_the_papers_alpha_keeps_the_norm_of_the_mean() -> None:
    """|sum tau|_1 / (T |tau_merged|_1): for task arithmetic 1 / (T alpha), whatever alpha was."""
    base, experts = models()
    for alpha in (1.0, 0.4):
        merged = merge_tensors("task_arithmetic", base, experts, {"alpha": alpha, "lines": 0.0, "lines_alpha": "auto"})
        torch.testing.assert_close(merged["head.w"], torch.full((3,), 1 + 3 / 2))


def test_it_modifies_any_method_and_is_off_by_default() -> None:
    base, experts = models()
    for method in ("ties", "iso_c", "average"):
        plain = merge_tensors(method, base, experts)
        scaled = merge_tensors(method, base, experts, {"lines": 1, "lines_alpha": 0})
        torch.testing.assert_close(scaled["layer.2.w"], plain["layer.2.w"])
        assert torch.equal(scaled["layer.0.w"], base["layer.0.w"])
