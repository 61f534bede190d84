"""Networks of transformers and of the user's own: built, filled whole or refused, asked."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from retex_cli.errors import RetexError, UsageError
from retex_cli.io.inputs import Example
from retex_cli.models.network import Network, load_weights, normalises

CPU = torch.device("cpu")
MODULE = """
import torch

class Net(torch.nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.blocks = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
        self.head = torch.nn.Linear(4, classes)

    def forward(self, pixel_values):
        return self.head(self.blocks(pixel_values / 255).mean((2, 3)))

def build(config):
    return Net(len(config["id2label"]))

def count(config):
    return 7

def fail(config):
    raise KeyError("width")

constant = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A config of three labels; the module ``own_network`` can be imported."""
    (tmp_path / "own_network.py").write_text(MODULE)
    (tmp_path / "broken_network.py").write_text("import torch\ndef (\n")
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "cat", "1": "dog", "2": "eel"}}))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("own_network", None)


def examples() -> list[Example]:
    images = torch.randint(0, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return [Example(tensors={"pixel_values": image}) for image in images]


def test_a_network_of_the_users_own_is_built_from_its_config_and_called_by_name(folder: Path) -> None:
    network = Network(folder, CPU, model="own_network:build")
    assert network.labels == ("cat", "dog", "eel")
    assert not network.module.training
    assert network.max_length is None
    inputs = network.inputs(examples())
    assert inputs["pixel_values"].dtype == torch.uint8
    weights = {name: torch.randn(value.shape) for name, value in network.module.state_dict().items() if value.ndim}
    weights["blocks.1.running_var"].abs_()
    network.load(weights.items(), "here")
    logits = network.logits(inputs)
    assert (logits.dtype, logits.shape) == (torch.float32, (2, 3))
    features = network.module.blocks(inputs["pixel_values"] / 255).mean((2, 3))
    torch.testing.assert_close(logits, features @ weights["head.weight"].T + weights["head.bias"])
    assert logits.requires_grad, "gradients are the caller's to switch off"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no_such_module:build", "cannot import no_such_module"),
        ("broken_network:build", "cannot import broken_network: SyntaxError"),
        ("own_network:missing", "missing is not there"),
        ("own_network:constant", "constant is not a function"),
        ("own_network:count", "returns int, not a torch.nn.Module"),
        ("own_network:fail", "KeyError: 'width'"),
        ("own_network", "names no function"),
    ],
)
def test_a_function_that_gives_no_network_is_wrong_usage(folder: Path, model: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        Network(folder, CPU, model=model)
    assert message in raised.value.message
    assert model in raised.value.message


def test_a_config_that_transformers_cannot_build_points_to_the_model_line(folder: Path) -> None:
    with pytest.raises(RetexError, match=r"config\.json") as raised:
        Network(folder, CPU)
    assert raised.value.hint is not None
    assert "model =" in raised.value.hint


def test_running_statistics_are_never_silently_missing(folder: Path) -> None:
    network = Network(folder, CPU, model="own_network:build")
    weights = network.module.state_dict()
    network.load({name: value for name, value in weights.items() if "num_batches" not in name}.items(), "here")
    with pytest.raises(RetexError, match=r"here: Net needs the tensor 'blocks\.1\.running_mean'"):
        network.load({name: value for name, value in weights.items() if "running_mean" not in name}.items(), "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": torch.ones(2)}, "here: tensor 'extra' has no place in Net"),
        ({"head.bias": torch.ones(4)}, r"here: 'head.bias' is \[4\], Net has it as \[3\]"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(folder: Path, change: Mapping[str, torch.Tensor], message: str) -> None:
    network = Network(folder, CPU, model="own_network:build")
    weights = {**network.module.state_dict(), **change}
    with pytest.raises(RetexError, match=message):
        network.load(weights.items(), "here")


def test_weights_are_taken_one_at_a_time(folder: Path) -> None:
    network = Network(folder, CPU, model="own_network:build")
    wanted = {name: torch.randn_like(value) for name, value in network.module.named_parameters()}
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()

    def one_at_a_time() -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in network.module.state_dict().items():
            fresh = wanted.get(name, value).clone()
            alive.add(fresh)
            yield name, fresh
            del fresh
            assert len(alive) <= 1

    network.load(one_at_a_time(), "here")
    assert all(torch.equal(value, wanted[name]) for name, value in network.module.named_parameters())


def test_integers_without_a_place_are_left_out(folder: Path) -> None:
    network = Network(folder, CPU, model="own_network:build")
    network.load({**network.module.state_dict(), "position_ids": torch.arange(4)}.items(), "here")


@pytest.mark.parametrize("given", ["transformer.wte.weight", "lm_head.weight"])
def test_tied_weights_may_stand_under_either_name(given: str) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    weights = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    for name in ("transformer.wte.weight", "lm_head.weight"):
        if name != given:
            del weights[name]
    load_weights(model, weights.items(), "here")
    assert torch.equal(model.lm_head.weight, weights[given])
    assert torch.equal(model.transformer.wte.weight, weights[given])


def test_logits_of_the_wrong_kind_are_refused(folder: Path) -> None:
    network = Network(folder, CPU, model="own_network:build")
    network.module.head = torch.nn.Identity()
    network.module.forward = lambda pixel_values: {"answer": pixel_values}
    with pytest.raises(RetexError, match=r"no logits \[inputs, classes\] but dict"):
        network.logits(network.inputs(examples()))


def test_side_files_by_place_or_content_build_the_same_network_and_nothing_stays(folder: Path) -> None:
    place = folder / "config.json"
    for content in (place, place.read_bytes()):
        network = Network.of({"config.json": content, "deep/more.txt": b"x"}, "cats", CPU, model="own_network:build")
        assert (network.name, network.labels) == ("cats", ("cat", "dog", "eel"))
    assert sorted(path.name for path in folder.glob("*.*")) == ["broken_network.py", "config.json", "own_network.py"]
    with pytest.raises(RetexError, match=r"^cats: no config\.json beside the weights"):
        Network.of({}, "cats", CPU, model="own_network:build")


def test_a_network_is_given_back_when_nobody_has_it(tmp_path: Path) -> None:
    code = (
        "import gc, weakref, torch; gc.disable(); from pathlib import Path; "
        "from retex_cli.models.network import Network; "
        f"network = Network(Path({str(tmp_path)!r}), torch.device('cpu')); held = weakref.ref(network.module); "
        "del network; print(held() is None)"
    )
    sizes = {"vocab_size": 5, "n_positions": 4, "n_embd": 8, "n_layer": 1, "n_head": 2}
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_layers_that_normalise_are_told_by_their_kind() -> None:
    assert not normalises(nn.Conv2d(3, 3, 1))
    assert normalises(nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4)))
    assert normalises(nn.Sequential(nn.BatchNorm2d(3)))


def layers(config: Mapping[str, str]) -> nn.Module:
    kinds = {"none": nn.Identity(), "layer": nn.LayerNorm(8), "batch": nn.BatchNorm2d(3)}
    return nn.Sequential(nn.Conv2d(3, 3, 1), kinds[config["norm"]])


@pytest.mark.parametrize(("norm", "fast"), [("layer", True), ("batch", False), ("none", False)])
def test_bfloat16_is_for_networks_that_normalise_each_input_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, norm: str, fast: bool
) -> None:
    monkeypatch.setattr("retex_cli.models.network.has_fast_bf16", lambda device: True)
    (tmp_path / "config.json").write_text(json.dumps({"norm": norm}))
    network = Network(tmp_path, CPU, model=f"{__name__}:layers")
    with network.inference():
        products = network.module[0](torch.ones(1, 3, 8, 8))
    assert network.fast_bf16 is fast
    assert (products.dtype is torch.bfloat16) is fast
