"""Any architecture, nothing lost: models of many kinds are merged, loaded by their class and compared tensor by tensor.

What a merge must give comes from the models in memory, so a tensor that saving, merging or loading loses, renames or
re-types shows. ``data/architectures.json`` has the architectures: the class, its configuration's, and tiny sizes.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from retex_cli.commands.merge import MergeConfig, plan, run

ARCHITECTURES = json.loads((Path(__file__).parent / "data/architectures.json").read_text())
RUNNING = ("running_mean", "running_var")
DENSITY = 0.2
State = dict[str, Tensor]


@dataclass(frozen=True)
class Saved:
    """A base and two experts, in memory and as folders ``base``, ``a`` and ``b``."""

    folder: Path
    base: transformers.PreTrainedModel
    experts: list[State]


def tuned(base: transformers.PreTrainedModel, seed: int) -> transformers.PreTrainedModel:
    """The model with every weight and statistic moved by a few percent, its counters moved on."""
    model, noise = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in untied(model.state_dict()).items():
            if not tensor.is_floating_point():
                tensor.add_(seed)
                continue
            scale = 0.02 * max(0.005, tensor.float().std(correction=0).item())
            change = scale * torch.randn(tensor.shape, generator=noise)
            tensor.add_((change.abs() if name.endswith("running_var") else change).to(tensor.dtype))
    return model


@pytest.fixture(scope="module", params=[*ARCHITECTURES, "Llama in bfloat16"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    name, _, dtype = request.param.partition(" in ")
    row, folder = ARCHITECTURES[name], tmp_path_factory.mktemp("models")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what transformers says of its own configurations
        config = getattr(transformers, row["config"])(**row["options"])
        torch.manual_seed(0)
        base = getattr(transformers, row["model"])(config)
        if dtype:
            base = base.to(getattr(torch, dtype))
        models = {"base": base, "a": tuned(base, 1), "b": tuned(base, 2)}
        for path, model in models.items():
            model.save_pretrained(folder / path)
    return Saved(folder, base, [models["a"].state_dict(), models["b"].state_dict()])


def storage(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()


def untied(state: State) -> State:
    """Every memory once."""
    return {name: state[name] for name in {storage(tensor): name for name, tensor in state.items()}.values()}


def task_vectors(saved: Saved, name: str) -> Tensor:
    """``tau [2, ...]``, float32 differences in float64."""
    base = saved.base.state_dict()[name].float()
    return torch.stack([expert[name].float() - base for expert in saved.experts]).double()


def averaged(saved: Saved, name: str) -> Tensor:
    """The mean of the experts, float64."""
    return torch.stack([expert[name].double() for expert in saved.experts]).mean(0)


def ties(saved: Saved) -> Callable[[Saved, str], Tensor]:
    """TIES by the paper's formulas, the top-k over all weights of an expert together."""
    taus = [task_vectors(saved, n).view(2, -1) for n, t in untied(saved.base.state_dict()).items() if learnt(n, t)]
    flat = torch.cat(taus, 1).abs()
    thresholds = flat.topk(int(DENSITY * flat.shape[1])).values[:, -1]

    def merged(saved: Saved, name: str) -> Tensor:
        tau = task_vectors(saved, name)
        if not learnt(name, saved.base.state_dict()[name]):
            return averaged(saved, name)
        kept = torch.where(tau.abs() >= thresholds.view(-1, *[1] * (tau.dim() - 1)), tau, 0)
        agree = (kept.sign() == kept.sum(0).sign()) & (kept != 0)
        return saved.base.state_dict()[name].double() + (kept * agree).sum(0) / agree.sum(0).clamp(min=1)

    return merged


def learnt(name: str, tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not name.endswith(RUNNING)


def header(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Name to type and shape, as stored."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("method", ["average", "ties"])
def test_every_tensor_of_the_merged_model_is_right(saved: Saved, method: str) -> None:
    experts = {task: str(saved.folder / task) for task in "ab"}
    output = saved.folder / method
    run(plan(MergeConfig(str(saved.folder / "base"), experts, str(output), method, device="cpu", threads=1)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, loading = type(saved.base).from_pretrained(output, output_loading_info=True)
    assert not any(loading.values()), loading
    assert header(output) == header(saved.folder / "base")
    before, after = saved.base.state_dict(), model.state_dict()
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {n: (t.dtype, t.shape) for n, t in before.items()}
    assert len(untied(after)) == len(untied(before)), "tied weights must stay tied"
    wanted = averaged if method == "average" else ties(saved)
    for name, tensor in after.items():
        if tensor.is_floating_point():
            rounding = torch.finfo(tensor.dtype).eps
            torch.testing.assert_close(tensor.double(), wanted(saved, name), rtol=rounding, atol=1e-8, msg=name)
        else:
            assert torch.equal(tensor, before[name]), name
