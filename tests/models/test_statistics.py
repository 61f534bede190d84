"""Statistics of inputs: equal to what a plain loop over the inputs finds, padding left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from retex_cli.io.inputs import Example, read_rows
from retex_cli.models import statistics
from retex_cli.models.network import Network
from retex_cli.models.statistics import fisher_diagonal, gram_layers, input_grams, positions
from retex_cli.progress import Silent

QUERY = "bert.encoder.layer.0.attention.self.query.weight"
DOWN = "bert.encoder.layer.1.output.dense.weight"


@pytest.fixture
def network(tiny_models: Path) -> Network:
    """The expert of the task cars, in float32."""
    folder = tiny_models / "experts/cars"
    network = Network(folder, torch.device("cpu"))
    network.load(load_file(folder / "model.safetensors").items(), str(folder))
    return network


@pytest.fixture
def examples(tiny_models: Path) -> list[Example]:
    rows = read_rows(tiny_models / "data/cars-inputs.jsonl")[:9]
    return [*rows, Example(text="car")]  # a short one: the others of its batch pad it


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 everywhere, so that results can be compared closely."""
    monkeypatch.setattr("retex_cli.models.network.has_fast_bf16", lambda device: False)


def _one_by_one(network: Network, examples: list[Example], name: str) -> Tensor:
    """The Gram matrix from single inputs, which need no padding."""
    seen: list[Tensor] = []
    layer = network.module.get_submodule(name.removesuffix(".weight"))
    hook = layer.register_forward_hook(lambda layer, given, output: seen.append(given[0].flatten(0, -2)))
    with torch.no_grad():
        for example in examples:
            network.logits(network.inputs([example]))
    hook.remove()
    x = torch.cat(seen).double()
    return x.T @ x


@pytest.mark.parametrize("threads", [1, 3])
def test_grams_are_sums_over_positions_that_count(network: Network, examples: list[Example], threads: int) -> None:
    found = dict(input_grams(network, examples, {QUERY, DOWN}, 4, threads, Silent()))
    assert set(found) == {QUERY, DOWN}
    for name, gram in found.items():
        torch.testing.assert_close(gram.double(), _one_by_one(network, examples, name), rtol=1e-4, atol=1e-3)


def test_layers_that_do_not_fit_together_take_another_pass(
    network: Network, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = dict(input_grams(network, examples, {QUERY, DOWN}, 4, 1, Silent()))
    monkeypatch.setattr(statistics, "GRAM_BYTES", 1)
    apart = dict(input_grams(network, examples, {QUERY, DOWN}, 4, 1, Silent()))
    for name, gram in together.items():
        torch.testing.assert_close(apart[name], gram, rtol=0, atol=0)


def test_a_convolution_is_applied_to_patches() -> None:
    """Rows times the weight as a matrix give the convolution's output."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, (3, 2), stride=2, padding=1, dilation=2, bias=False)
    x = torch.randn(4, 3, 9, 8)
    expected = layer(x).permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(positions(layer, x, None) @ layer.weight.flatten(1).T, expected)


def test_grouped_convolutions_and_embeddings_have_no_gram() -> None:
    module = nn.ModuleDict(
        {"emb": nn.Embedding(5, 4), "dw": nn.Conv2d(4, 4, 3, groups=4), "pw": nn.Conv2d(4, 6, 1), "fc": nn.Linear(6, 2)}
    )
    assert gram_layers(module) == {"pw.weight": 4, "fc.weight": 6}


@pytest.mark.parametrize("threads", [1, 2])
def test_fisher_is_the_expectation_over_the_models_answers(
    network: Network, examples: list[Example], threads: int
) -> None:
    names = ["classifier.weight", QUERY, "bert.embeddings.word_embeddings.weight"]
    found = fisher_diagonal(network, examples[:4], names, threads, Silent())
    parameters = dict(network.module.named_parameters())
    for name in names:
        expected = torch.zeros_like(parameters[name])
        for example in examples[:4]:
            likelihood = network.logits(network.inputs([example])).log_softmax(-1)[0]
            for k in range(len(likelihood)):
                (gradient,) = torch.autograd.grad(likelihood[k], [parameters[name]], retain_graph=True)
                expected += likelihood[k].exp().detach() * gradient.square() / 4
        torch.testing.assert_close(found[name], expected, rtol=5e-3, atol=1e-7)


def test_gradients_are_off_again_afterwards(network: Network, examples: list[Example]) -> None:
    network.module.requires_grad_(False)
    found = fisher_diagonal(network, examples[:2], ["classifier.weight"], 1, Silent())
    assert found["classifier.weight"].abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in network.module.parameters())
