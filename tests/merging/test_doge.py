"""DOGE against automatic differentiation and torch's own Adam in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from retex_cli.merging.memory import merge_tensors

SHAPES = {
    "embed.weight": (30, 8),
    "layer.0.dense.weight": (12, 8),
    "layer.0.dense.bias": (12,),
    "layer.1.dense.weight": (8, 20),
}


def models(tasks: int = 3) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    draw = torch.Generator().manual_seed(1)
    base = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    experts = {
        str(t): {name: w + 0.05 * torch.randn(w.shape, generator=draw) for name, w in base.items()}
        for t in range(tasks)
    }
    return base, experts


def reference_correction(taus: Tensor, scale: float, subspace: int, steps: int) -> tuple[Tensor, Tensor]:
    """The learned correction and the weights of one layer, by autograd."""
    tasks, rank = len(taus), min(taus.shape[1:])
    weights = scale / taus.flatten(1).norm(dim=1)
    joined = torch.cat([torch.linalg.svd(tau, full_matrices=False)[0][:, : rank // tasks] for tau in taus], 1)
    basis = torch.linalg.svd(joined, full_matrices=False)[0][:, : rank // subspace]
    delta = torch.zeros_like(taus[0], requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=1e-4)
    for _ in range(steps):
        optimiser.zero_grad()
        mixed = (weights[:, None, None] * (taus + delta)).sum(0)
        loss = sum(((tau * (tau - mixed)).sum(1) ** 2).sum() for tau in taus)
        loss.backward()  # type: ignore[union-attr]
        assert delta.grad is not None
        delta.grad -= basis @ basis.T @ delta.grad
        optimiser.step()
    return delta.detach(), weights


@pytest.mark.parametrize("steps", [0, 1, 30])
def test_it_equals_autograd_in_float64(steps: int) -> None:
    base, experts = models()
    options = {"steps": steps, "subspace": 3, "scale": 0.2}
    merged = merge_tensors("doge", base, experts, options)
    names = ["layer.0.dense.weight", "layer.1.dense.weight"]
    flat = torch.stack([torch.cat([(e[n] - base[n]).flatten() for n in names]) for e in experts.values()])
    cut = flat.abs().sort(1, descending=True).values[:, int(0.3 * flat.shape[1]) - 1]
    for name in names:
        taus = torch.stack([(e[name] - base[name]).double() for e in experts.values()])
        delta, weights = reference_correction(taus, 0.2, 3, steps)
        kept = taus.abs() >= cut[:, None, None]
        wanted = base[name].double() + (weights[:, None, None] * kept * (taus + delta)).sum(0)
        torch.testing.assert_close(merged[name].double(), wanted, rtol=1e-5, atol=2e-5)
        if steps > 1:
            plain = merge_tensors("doge", base, experts, {**options, "steps": 0})
            assert (merged[name] - plain[name]).abs().max() > 1e-4, "the correction does something"


def test_only_matrices_in_numbered_blocks_take_part() -> None:
    base, experts = models()
    merged = merge_tensors("doge", base, experts, {"steps": 1})
    for name in ("embed.weight", "layer.0.dense.bias"):
        assert torch.equal(merged[name], base[name])


def test_a_task_that_did_not_move_a_layer_has_no_say_in_it() -> None:
    base, experts = models(2)
    still = {**experts, "still": {**base, "layer.1.dense.weight": experts["0"]["layer.1.dense.weight"]}}
    name, options = "layer.0.dense.weight", {"steps": 3, "density": 1}
    merged = merge_tensors("doge", base, still, options)[name]
    torch.testing.assert_close(merged, merge_tensors("doge", base, experts, options)[name])


def test_doge_worked_by_hand() -> None:
    """No steps, everything kept: each task vector scaled to norm 0.5, then summed. (3, 4) has norm 5, (0, 2) norm 2."""
    experts = {"a": {"w": torch.tensor([[3.0, 4.0]])}, "b": {"w": torch.tensor([[0.0, 2.0]])}}
    merged = merge_tensors("doge", {"w": torch.zeros(1, 2)}, experts, {"steps": 0, "density": 1, "scale": 0.5})["w"]
    torch.testing.assert_close(merged, torch.tensor([[0.3, 0.4 + 0.5]]))
