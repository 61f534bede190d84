"""Merges that look at inputs: statistics, chosen scales, BatchNorm measured; what they record and refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from retex_cli.io.safetensors_file import SafetensorsFile

if TYPE_CHECKING:
    from tests.conftest import Retex


def _recipe(path: str) -> dict[str, object]:
    file = SafetensorsFile(Path(path))
    try:
        return json.loads(file.metadata["retex.recipe"])  # type: ignore[no-any-return]
    finally:
        file.close()


@pytest.mark.parametrize("method", ["fisher", "regmean", "esm"])
def test_methods_with_statistics_merge_files(workspace: Path, retex: Retex, method: str) -> None:
    result = retex("merge", "--method", method, "--samples", "16", "-o", "m.safetensors", "--json")
    assert result.code == 0, result.err
    retex("merge", "-o", "average.safetensors")
    merged, average = load_file("m.safetensors"), load_file("average.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in merged.items()} == {n: (t.shape, t.dtype) for n, t in average.items()}
    assert all(tensor.isfinite().all() for tensor in merged.values())
    layer = "encoder.layer.0.attention.self.query.weight"
    assert (merged[layer] - average[layer]).abs().max() > 1e-5, "the statistics changed something"
    assert _recipe("m.safetensors")["measured_inputs"] == {"cars": 16, "dtd": 16}
    assert result.json["measured_inputs"] == {"cars": 16, "dtd": 16}


def test_regmean_is_the_least_squares_solution_on_the_experts_inputs(workspace: Path, retex: Retex) -> None:
    """Outputs of the merged layer are closer to the experts' on their own inputs than the average's."""
    from retex_cli.models.network import Network

    assert retex("merge", "--method", "regmean", "--set", "shrink=1", "-o", "m.safetensors").code == 0
    assert retex("merge", "-o", "average.safetensors").code == 0
    name = "encoder.layer.1.intermediate.dense"
    distance = {"m": 0.0, "average": 0.0}
    for task in ("cars", "dtd"):
        folder = Path("experts", task)
        network = Network(folder, torch.device("cpu"))
        weights = load_file(folder / "model.safetensors")
        network.load(weights.items(), task)
        seen: list[Tensor] = []
        layer = network.module.get_submodule(f"bert.{name}")
        layer.register_forward_hook(lambda layer, given, output, seen=seen: seen.append(given[0].flatten(0, 1)))
        from retex_cli.io.inputs import read_rows

        with torch.no_grad():
            for row in read_rows(f"data/{task}-inputs.jsonl"):
                network.logits(network.inputs([row]))
        x = torch.cat(seen)
        for file in distance:
            offset = load_file(f"{file}.safetensors")[f"{name}.weight"] - weights[f"bert.{name}.weight"]
            distance[file] += (x @ offset.T).square().sum().item()
    assert distance["m"] < 0.9 * distance["average"]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_scale_is_chosen_by_agreement_and_recorded(workspace: Path, retex: Retex, threads: int) -> None:
    line = ["merge", "--method", "task_arithmetic", "--threads", threads, "--overwrite", "-o", "m.safetensors"]
    result = retex(*map(str, line), "--alpha", "auto")
    assert result.code == 0, result.err
    scale = _recipe("m.safetensors")["scale"]
    assert isinstance(scale, dict)
    tried = {float(alpha): share for alpha, share in scale["tried"].items()}
    assert scale["by"] == "agreement with the experts on 12 held-out inputs a task"  # a quarter of 48
    assert tried[scale["alpha"]] == max(tried.values())
    assert tried[scale["alpha"]] > tried[0.1], "the scale matters here"
    chosen = load_file("m.safetensors")
    assert retex(*map(str, line), "--alpha", str(scale["alpha"])).code == 0
    for name, tensor in load_file("m.safetensors").items():
        assert torch.equal(tensor, chosen[name]), name


def test_larger_scales_are_tried_while_they_are_better(workspace: Path, retex: Retex) -> None:
    """A tenth of each task vector is weighed in: the best scale is ten times what it was."""
    line = ("merge", "--method", "task_arithmetic", "--alpha", "auto", "--weight", "0.1", "-o", "m.safetensors")
    result = retex(*line, "--json")
    assert result.code == 0, result.err
    scale = result.json["scale"]
    assert isinstance(scale, dict)
    assert scale["alpha"] > 2, scale
    assert max(map(float, scale["tried"])) > scale["alpha"], "a larger one was no better"


def test_a_scale_is_chosen_on_labelled_data_where_asked(workspace: Path, retex: Retex) -> None:
    flags = [f"--validation={task}=data/{task}-test.jsonl" for task in ("cars", "dtd")]  # any labelled rows do here
    result = retex("merge", "--method", "ties", "--alpha", "validation", *flags, "-o", "m.safetensors", "--json")
    assert result.code == 0, result.err
    scale = result.json["scale"]
    assert isinstance(scale, dict)
    assert scale["by"] == "share of the experts' accuracy on 48 labelled validation rows a task"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--alpha", "validation"], 2, "task 'cars' has no validation data"),
        (["--set", "*.bias:alpha=auto"], 2, "for '*.bias' alone cannot be chosen"),
        (["--alpha", "auto", "--set", "lines=1"], 2, "both set the same scale"),
        (["--alpha", "autos"], 2, "option 'alpha' of method 'task_arithmetic' is 'autos'"),
        (["--batchnorm", "reestimate"], 2, "the base has no running statistics"),
        (["--batchnorm", "some"], 2, "unknown --batchnorm 'some'"),
        (["--alpha", "auto", "--inputs", "cars=few.jsonl"], 1, "few.jsonl: 3 inputs for task 'cars'"),
    ],
)
def test_refusals(workspace: Path, retex: Retex, arguments: list[str], code: int, message: str) -> None:
    Path("few.jsonl").write_text('{"text": "one"}\n' * 3)
    result = retex("merge", "--method", "task_arithmetic", *arguments, "-o", "m.safetensors")
    assert (result.code, Path("m.safetensors").exists()) == (code, False), result.err
    assert message in result.err


def test_an_expert_without_a_config_cannot_be_run(workspace: Path, retex: Retex) -> None:
    (workspace / "experts/cars/config.json").unlink()
    result = retex("merge", "--method", "regmean", "-o", "m.safetensors")
    assert result.code == 1
    assert "experts/cars: no config.json" in result.err
    assert not Path("m.safetensors").exists()


NETWORK = """
from torch import nn

class Small(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, classes)

    def forward(self, pixels):
        return self.head(self.norm(self.stem(pixels)).relu().mean((2, 3)))

def build(config):
    return Small(len(config["id2label"]))
"""


@pytest.fixture
def vision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base and two experts of a small convolutional network with a BatchNorm, on inputs of different brightness."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("small_network.py").write_text(NETWORK)
    torch.manual_seed(0)
    stem, lines = nn.Conv2d(3, 6, 3, bias=False).weight.detach(), []
    for place, task in enumerate(("base", "dark", "light")):
        Path(task).mkdir()
        Path(task, "config.json").write_text(json.dumps({"id2label": {"0": "a", "1": "b"}}))
        weights = {"stem.weight": stem + 0.02 * place * torch.randn_like(stem), "norm.weight": torch.ones(6)}
        weights |= {"norm.bias": torch.zeros(6), "norm.running_mean": torch.full((6,), float(place))}
        weights |= {"norm.running_var": torch.ones(6), "norm.num_batches_tracked": torch.tensor(7)}
        if task != "base":
            weights |= {"head.weight": torch.randn(2, 6), "head.bias": torch.zeros(2)}
            save_file({"pixels": place + torch.randn(24, 3, 5, 5)}, f"{task}.safetensors")
            lines.append(f'[tasks.{task}]\nexpert = "{task}"\ninputs = "{task}.safetensors"\n')
        save_file(weights, f"{task}/model.safetensors")
    Path("retex.toml").write_text('[model]\nbase = "base"\nmodel = "small_network:build"\n' + "\n".join(lines))
    return tmp_path


def test_batchnorm_is_averaged_or_measured(vision: Path, retex: Retex) -> None:
    result = retex("merge", "-o", "average.safetensors", "--allow-unrelated")
    assert result.code == 0, result.err
    average = load_file("average.safetensors")
    torch.testing.assert_close(average["norm.running_mean"], torch.full((6,), 1.5))
    result = retex(
        "merge", "--batchnorm", "reestimate", "-o", "m.safetensors", "--batch-size", "48", "--allow-unrelated"
    )
    assert result.code == 0, result.err
    merged = load_file("m.safetensors")
    pixels = torch.cat([load_file(f"{task}.safetensors")["pixels"] for task in ("dark", "light")])
    hidden = nn.functional.conv2d(pixels, merged["stem.weight"], padding=1)
    torch.testing.assert_close(merged["norm.running_mean"], hidden.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged["norm.running_var"], hidden.var((0, 2, 3)), rtol=1e-4, atol=1e-5)
    for name in ("stem.weight", "norm.weight", "norm.num_batches_tracked"):
        assert torch.equal(merged[name], average[name]), name
    assert _recipe("m.safetensors")["batchnorm"] == "re-estimated on the tasks' inputs"


def test_a_scale_is_chosen_with_the_statistics_that_will_be_written(vision: Path, retex: Retex) -> None:
    """Averaged statistics are wrong for these inputs: the scores of the same scales differ."""
    line = ("merge", "--method", "task_arithmetic", "--alpha", "auto", "--allow-unrelated", "--json")
    averaged = retex(*line, "-o", "average.safetensors").json["scale"]
    chosen = retex(*line, "--batchnorm", "reestimate", "-o", "m.safetensors").json["scale"]
    assert averaged["tried"] != chosen["tried"]  # type: ignore[index]
    pixels = torch.cat([load_file(f"{task}.safetensors")["pixels"][:18] for task in ("dark", "light")])
    hidden = nn.functional.conv2d(pixels, load_file("m.safetensors")["stem.weight"], padding=1)
    found = load_file("m.safetensors")["norm.running_mean"]
    torch.testing.assert_close(found, hidden.mean((0, 2, 3)), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("method", ["fisher", "regmean", "esm"])
def test_statistics_of_a_convolutional_network(vision: Path, retex: Retex, method: str) -> None:
    line = ("merge", "--method", method, "--allow-unrelated", "--samples", "24")
    result = retex(*line, "-o", "m.safetensors")
    assert result.code == 0, result.err
    merged = load_file("m.safetensors")
    assert all(tensor.isfinite().all() for tensor in merged.values())
    experts = [load_file(f"{task}/model.safetensors")["stem.weight"] for task in ("dark", "light")]
    assert (merged["stem.weight"] - (experts[0] + experts[1]) / 2).abs().max() > 1e-6


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A base and two experts that are vision transformers, whose files name tensors otherwise than their modules do."""
    import numpy as np
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification, set_seed

    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(image_size=16, patch_size=8, initializer_range=0.3, num_labels=2, **sizes)
    set_seed(0)
    model, given = ViTForImageClassification(config), ["--base", "base"]
    model.save_pretrained("base")
    for task in ("a", "b"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        model.save_pretrained(task)
        size = {"height": 16, "width": 16}
        Path(task, "preprocessor_config.json").write_text(
            json.dumps({"image_processor_type": "ViTImageProcessor", "size": size})
        )
        Path(f"{task}-inputs").mkdir()
        for n in range(16):
            noise = np.random.default_rng(n).integers(0, 255, (16, 16, 3), np.uint8)
            Image.fromarray(noise).save(f"{task}-inputs/{n}.png")
        given += ["--expert", f"{task}={task}", "--inputs", f"{task}={task}-inputs"]
    return given


@pytest.mark.parametrize("method", ["fisher", "regmean", "esm"])
def test_statistics_reach_tensors_that_files_name_otherwise(pictures: list[str], retex: Retex, method: str) -> None:
    result = retex("merge", *pictures, "--method", method, "--samples", "16", "-o", "m.safetensors")
    assert result.code == 0, result.err
    merged = load_file("m.safetensors")
    without = retex("merge", *pictures, "--method", "average", "-o", "average.safetensors")
    assert without.code == 0, without.err
    average = load_file("average.safetensors")
    layers = [name for name in merged if "layer.0." in name and name.endswith("weight") and merged[name].ndim == 2]
    assert len(layers) == 6
    assert all((merged[name] - average[name]).abs().max() > 1e-5 for name in layers)
    lacking = re.findall(r"(\d+) matrices have no statistics", result.err)
    assert sum(map(int, lacking)) <= 2, "the class token and the positions, which no layer reads"
