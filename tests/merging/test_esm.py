"""ESM against a float64 reference that decomposes the outputs' shift itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from retex_cli.merging import esm
from retex_cli.merging.memory import merge_tensors

SHAPES = {
    "layer.0.up.weight": (12, 8),
    "layer.0.down.weight": (8, 12),
    "layer.0.out.weight": (8, 8),
    "layer.0.up.bias": (12,),
    "layer.1.up.weight": (12, 8),
    "layer.1.down.weight": (8, 12),
    "layer.1.out.weight": (8, 8),
    "embed.weight": (9, 8),
}
TARGETS = [name for name in SHAPES if "up.weight" in name or "down.weight" in name]
TASKS = ("a", "b", "c")


def models() -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """Base, experts, and inputs ``[64, d_in]`` of every target layer."""
    draw = torch.Generator().manual_seed(2)
    base = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    experts = {
        task: {n: w + (0.02 + 0.02 * i) * torch.randn(w.shape, generator=draw) for n, w in base.items()}
        for i, task in enumerate(TASKS)
    }
    return base, experts, {t: {n: torch.randn(64, SHAPES[n][1], generator=draw) for n in TARGETS} for t in TASKS}


def polar_times_mean(matrix: Tensor) -> Tensor:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right * values.mean()


def reference_layer(taus: dict[str, Tensor], inputs: dict[str, Tensor], vision: bool) -> Tensor:
    """The merged task vector of one layer, from the SVD of the shift of its outputs."""
    k = next(iter(taus.values())).shape[0] // len(taus)
    lefts, rights, norms = [], [], []
    for task, tau in taus.items():
        shift = inputs[task].double() @ tau.T
        _, s, vh = torch.linalg.svd(shift, full_matrices=False)
        eigenvalues, directions = s**2 / (len(shift) - 1), vh.T
        coordinates = directions.T @ tau
        norms.append(coordinates.norm())
        g = (eigenvalues[:k] / eigenvalues[:k].mean()) ** 0.15
        g = g / g.mean()
        lefts.append(directions[:, :k] * g)
        rights.append(coordinates[:k] * g[:, None])
    if vision:
        mean = torch.stack(norms).mean()
        rights = [right * (norm / mean) ** 2 for right, norm in zip(rights, norms, strict=True)]
    left, right = torch.cat(lefts, 1), torch.cat(rights)
    if vision:
        lengths = right.norm(dim=0)
        right = right * (lengths / lengths.mean()) ** 2
    return (2 if vision else 1) * polar_times_mean(left) @ polar_times_mean(right)


def reference_joined(taus: list[Tensor]) -> Tensor:
    """TSV-M as the RoBERTa code has it: polar factors times their mean singular values."""
    k = min(taus[0].shape) // len(taus)
    left, values, right = zip(*(torch.linalg.svd(tau, full_matrices=False) for tau in taus), strict=True)
    stacked = torch.cat([v[:k] for v in right])
    return (
        polar_times_mean(torch.cat([u[:, :k] for u in left], 1))
        * torch.cat([s[:k] for s in values])
        @ (polar_times_mean(stacked))
    )


Models = dict[str, dict[str, Tensor]]


def reference(base: dict[str, Tensor], experts: Models, inputs: Models, vision: bool) -> dict[str, Tensor]:
    """Merged task vectors of all matrices in the blocks, with the scaling between layers."""
    deltas = {}
    for name in SHAPES:
        taus = {task: (experts[task][name] - base[name]).double() for task in TASKS}
        if name in TARGETS:
            deltas[name] = reference_layer(taus, {t: inputs[t][name] for t in TASKS}, vision)
        elif not vision and name.endswith("weight"):
            deltas[name] = reference_joined(list(taus.values()))
        elif name.startswith("layer.") and name.endswith("weight"):
            merged = merge_tensors("tsv_m", {name: base[name]}, {t: {name: experts[t][name]} for t in TASKS})
            deltas[name] = (merged[name] - base[name]).double()
    for kind in ("up", "down", "out"):
        pair = [f"layer.{i}.{kind}.weight" for i in (0, 1)]
        mean = sum(deltas[name].norm() for name in pair) / 2
        for name in pair:
            deltas[name] = deltas[name] * (deltas[name].norm() / mean) ** 2
    return deltas


@pytest.mark.parametrize("variant", ["vision", "roberta"])
def test_it_equals_the_published_definition_in_float64(variant: str) -> None:
    base, experts, inputs = models()
    grams = {t: {n: x.T @ x for n, x in layers.items()} for t, layers in inputs.items()}
    merged = merge_tensors("esm", base, experts, {"variant": variant}, statistics=grams)
    for name, delta in reference(base, experts, inputs, variant == "vision").items():
        found = (merged[name] - base[name]).double()
        assert (found - delta).norm() < 2e-5 * delta.norm(), name


def test_what_has_no_statistics_follows_the_papers_other_rules() -> None:
    base, experts, inputs = models()
    grams = {t: {n: x.T @ x for n, x in layers.items()} for t, layers in inputs.items()}
    merged = merge_tensors("esm", base, experts, statistics=grams)
    tsv = merge_tensors("tsv_m", base, experts)
    torch.testing.assert_close(merged["embed.weight"], tsv["embed.weight"])
    torch.testing.assert_close(merged["layer.0.up.bias"], tsv["layer.0.up.bias"])
    roberta = merge_tensors("esm", base, experts, {"variant": "roberta"}, statistics=grams)
    assert torch.equal(roberta["layer.0.up.bias"], base["layer.0.up.bias"])


@pytest.mark.parametrize("switch", ["eigenvalues", "tasks", "columns", "layers", "polar"])
def test_every_part_can_be_left_out(switch: str) -> None:
    base, experts, inputs = models()
    grams = {t: {n: x.T @ x for n, x in layers.items()} for t, layers in inputs.items()}
    full = merge_tensors("esm", base, experts, statistics=grams)
    without = merge_tensors("esm", base, experts, {switch: "off"}, statistics=grams)
    assert not torch.allclose(full[TARGETS[0]], without[TARGETS[0]], rtol=1e-3)


def test_alpha_scales_the_layers_with_statistics_alone() -> None:
    base, experts, inputs = models()
    grams = {t: {n: x.T @ x for n, x in layers.items()} for t, layers in inputs.items()}
    one, half = (merge_tensors("esm", base, experts, {"alpha": a}, statistics=grams) for a in (1, 0.5))
    name = TARGETS[0]
    torch.testing.assert_close(2 * (half[name] - base[name]), one[name] - base[name], rtol=1e-4, atol=1e-5)
    assert torch.equal(half["layer.0.out.weight"], one["layer.0.out.weight"])


def test_esm_worked_by_hand() -> None:
    """One task, identity inputs, tau = diag(2, 1): directions e1, e2, eigenvalues 4 and 1, coordinates tau itself.

    Everything is kept; without weights, scalings and polar step the product of the factors is tau. With the polar step
    both factors become the identity times the mean singular value: 1 on the left, 1.5 on the right.
    """
    experts, grams = {"a": {"w": torch.diag(torch.tensor([2.0, 1.0]))}}, {"a": {"w": torch.eye(2)}}
    options = {"variant": "roberta", "eigenvalues": "off", "polar": "off"}
    plain = merge_tensors("esm", {"w": torch.zeros(2, 2)}, experts, options, statistics=grams)["w"]
    torch.testing.assert_close(plain, torch.diag(torch.tensor([2.0, 1.0])))
    polar = merge_tensors("esm", {"w": torch.zeros(2, 2)}, experts, {**options, "polar": "on"}, statistics=grams)["w"]
    torch.testing.assert_close(polar, 1.5 * torch.eye(2))


def test_every_matrix_is_merged_once_although_the_survey_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts, inputs = models()
    grams = {t: {n: x.T @ x for n, x in layers.items()} for t, layers in inputs.items()}
    merged, plain = [], esm._merged
    monkeypatch.setattr(esm, "_merged", lambda view, switches: merged.append(view.name) or plain(view, switches))
    merge_tensors("esm", base, experts, statistics=grams)
    assert sorted(merged) == sorted(name for name in SHAPES if name.endswith("weight"))


@pytest.mark.parametrize("shape", [(40, 9), (9, 40)])
@pytest.mark.parametrize("rows", [3, 100])
def test_the_first_directions_of_the_shift_on_either_side(shape: tuple[int, int], rows: int) -> None:
    """With three rows of inputs there are three directions; the others are those of a basis."""
    draw = torch.Generator().manual_seed(3)
    tau, inputs = (torch.randn(size, generator=draw, dtype=torch.float64) for size in (shape, (rows, shape[1])))
    values, directions = esm.shift_spectrum(tau, inputs.T @ inputs, 5)
    torch.testing.assert_close(directions.T @ directions, torch.eye(5, dtype=torch.float64))
    _, s, v = torch.linalg.svd(inputs @ tau.T, full_matrices=False)
    count = min(5, rows)
    torch.testing.assert_close(values[:count], s[:count] ** 2)
    torch.testing.assert_close((directions.T @ v[:count].T).abs()[:count], torch.eye(count, dtype=torch.float64))
