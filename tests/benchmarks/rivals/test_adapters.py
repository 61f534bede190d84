"""The residual adapters of ESM++."""

from __future__ import annotations

import pytest
import torch
from rivals import adapters
from rivals.form import Case, Known

QUERY, OUT = "layer.0.attention.self.query.weight", "layer.0.output.dense.weight"


@pytest.fixture
def case() -> Case:
    generator = torch.Generator().manual_seed(0)
    merged = {name: torch.zeros(32, 24) for name in (QUERY, OUT)} | {"bias": torch.zeros(32)}
    expert = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in merged.items()}
    inputs = torch.randn(100, 24, generator=generator) * torch.linspace(0.01, 3, 24)
    return Case(Known(merged, merged), {"a": expert}, lambda: {"a": dict.fromkeys((QUERY, OUT), inputs.T @ inputs)})


def test_directions_are_those_of_the_shift(case: Case) -> None:
    offset, gram = case.experts["a"][QUERY], case.grams()["a"][QUERY]
    inputs = torch.linalg.cholesky(gram.double()).T  # any X with this Gram matrix
    wanted = torch.linalg.svd((inputs @ offset.double().T).T)[0][:, :4].float()
    found = adapters.shift_directions(offset, gram, 4)
    torch.testing.assert_close((found.T @ wanted).abs(), torch.eye(4), atol=1e-4, rtol=0)


def test_outputs_are_nearer_than_with_the_best_of_the_weights(case: Case) -> None:
    offset, gram = case.experts["a"][QUERY], case.grams()["a"][QUERY]
    files = adapters.adapters(case, 4, everywhere=False)
    u, s, vh = torch.linalg.svd(offset)
    by_weights = offset - u[:, :4] * s[:4] @ vh[:4]
    by_outputs = offset - adapters.decode(case.known, files, "a")[QUERY]
    shifts = [float((rest @ gram * rest).sum()) for rest in (by_outputs, by_weights)]
    assert shifts[0] < shifts[1]


def test_only_the_published_layers_or_all(case: Case) -> None:
    expert = case.experts["a"]
    found = adapters.decode(case.known, adapters.adapters(case, 8, everywhere=False), "a")
    assert found[QUERY].any()
    assert not found[OUT].any()
    assert not found["bias"].any()
    files = adapters.adapters(case, 1000, everywhere=True)
    for name, tensor in adapters.decode(case.known, files, "a").items():
        torch.testing.assert_close(tensor, expert[name], atol=3e-3, rtol=0)


def test_a_task_costs_its_factors(case: Case) -> None:
    size = len(adapters.adapters(case, 4, everywhere=False).tasks["a"])
    assert size == pytest.approx(2 * 4 * (32 + 24), abs=32)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        (QUERY, True),
        ("encoder.layer.0.intermediate.dense.weight", True),
        ("model.layers.0.mlp.up_proj.weight", True),
        ("visual.blocks.0.attn.in_proj_weight", True),
        ("encoder.layer.0.attention.output.dense.weight", False),
        (OUT, False),
        ("embeddings.word_embeddings.weight", False),
    ],
)
def test_published_layers(name: str, published: bool) -> None:
    assert adapters.is_published(name) is published
