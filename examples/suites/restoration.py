"""Make the restoration family: one base and four experts that undo one degradation each, far from the base.

    python examples/suites/restoration.py .demo/restoration

Two photographs that scikit-learn carries are cut into patches; the right third of each is kept for tests. The experts'
offsets are about a third of the weights, and no layer normalises: what merging and offsets written for classifiers get
wrong. Writes a workspace as ``make.py`` does, with ``data/TASK-inputs`` (degraded patches) and ``data/TASK-test``
(degraded and clean). Answers are images, so ``benchmarks/promises.py`` evaluates it, and not ``retex eval``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import restorer
import torch
from data import REFERENCES, cache_dir
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.nn import functional

Degradation = Callable[[Tensor, torch.Generator], Tensor]
SIZE = 18
"""Pixels of a patch's side."""


def _noise(clean: Tensor, generator: torch.Generator) -> Tensor:
    return clean + 0.2 * torch.randn(clean.shape, generator=generator)


def _blur(clean: Tensor, generator: torch.Generator) -> Tensor:
    del generator
    line = torch.exp(-torch.arange(-3.0, 4).square() / 4.5)
    kernel = torch.outer(line, line) / line.sum() ** 2
    padded = functional.pad(clean, (3, 3, 3, 3), mode="reflect")
    return functional.conv2d(padded, kernel.expand(3, 1, 7, 7), groups=3)


def _pixels(clean: Tensor, generator: torch.Generator) -> Tensor:
    del generator
    return functional.avg_pool2d(clean, 3).repeat_interleave(3, 2).repeat_interleave(3, 3)


def _holes(clean: Tensor, generator: torch.Generator) -> Tensor:
    present = torch.rand(clean[:, :1].shape, generator=generator) > 0.4
    return clean * present


def _mild(clean: Tensor, generator: torch.Generator) -> Tensor:
    """What the base undoes: a little noise, on half of the patches a little blur."""
    strength = 0.08 * torch.rand(len(clean), 1, 1, 1, generator=generator)
    softened = functional.avg_pool2d(functional.pad(clean, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    blurred = torch.rand(len(clean), 1, 1, 1, generator=generator) < 0.5
    return torch.where(blurred, softened, clean) + strength * torch.randn(clean.shape, generator=generator)


TASKS: dict[str, Degradation] = {"noise": _noise, "blur": _blur, "pixels": _pixels, "holes": _holes}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a network's weights, apart from the machine's rounding."""

    task: str
    steps: int
    seed: int = 0
    rate: float = 1e-3
    batch_size: int = 8
    size: int = SIZE
    channels: int = restorer.CHANNELS
    layers: int = restorer.LAYERS

    @property
    def folder(self) -> Path:
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]
        return cache_dir() / "experts" / f"restore-{self.task}-{digest}"


BASE = Recipe("base", steps=2000)


def photographs(test: bool) -> list[Tensor]:
    """float32 [3, height, width], 0 to 1: the left two thirds, or for tests the right third."""
    whole = [torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 for image in load_sample_images().images]
    cut = whole[0].shape[2] * 2 // 3
    return [image[:, :, cut:] if test else image[:, :, :cut] for image in whole]


def patches(images: list[Tensor], count: int, generator: torch.Generator) -> Tensor:
    """float32 [count, 3, SIZE, SIZE] from anywhere."""
    found = []
    for k in range(count):
        image = images[k % len(images)]
        top, left = (int(torch.randint(side - SIZE, (1,), generator=generator)) for side in image.shape[1:])
        found.append(image[:, top : top + SIZE, left : left + SIZE])
    return torch.stack(found)


def trained(recipe: Recipe, start: Path | None) -> Path:
    """The folder of a network trained to undo ``recipe.task``, unless the cache has it."""
    folder = recipe.folder
    if folder.exists():
        return folder
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    network = restorer.build({})
    if start is not None:
        network.load_state_dict(load_file(start / "model.safetensors"))
    degrade, images = TASKS.get(recipe.task, _mild), photographs(test=False)
    optimiser = torch.optim.Adam(network.parameters(), lr=recipe.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / recipe.steps)
    for _ in range(recipe.steps):
        clean = patches(images, recipe.batch_size, generator)
        loss = functional.mse_loss(network(degrade(clean, generator)), clean)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimiser.step()
        schedule.step()
    partial = folder.with_name(folder.name + f".partial-{os.getpid()}")
    partial.mkdir(parents=True)
    save_file(network.state_dict(), partial / "model.safetensors")
    (partial / "config.json").write_text(json.dumps({"architectures": ["Restorer"], **asdict(recipe)}, indent=1))
    partial.rename(folder)
    return folder


def make(workspace: Path, steps: int) -> None:
    """Everything ``retex`` needs under ``workspace``."""
    (workspace / "experts").mkdir(parents=True, exist_ok=True)
    (workspace / "data").mkdir(exist_ok=True)
    base = trained(BASE, None)
    _link(workspace / "base", base)
    entries = []
    for task, degrade in TASKS.items():
        folder = trained(Recipe(task, steps), base)
        _link(workspace / "experts" / task, folder)
        generator = torch.Generator().manual_seed(1)
        inputs = degrade(patches(photographs(test=False), REFERENCES, generator), generator)
        save_file({"pixel_values": inputs}, workspace / f"data/{task}-inputs.safetensors")
        clean = patches(photographs(test=True), REFERENCES, generator)
        save_file(
            {"pixel_values": degrade(clean, generator), "clean": clean}, workspace / f"data/{task}-test.safetensors"
        )
        print(f"{task}: offset {_distance(base, folder):.2f} of the weights")
        entries.append(f'[tasks.{task}]\nexpert = "experts/{task}"\ninputs = "data/{task}-inputs.safetensors"\n')
    shutil.copy(Path(restorer.__file__), workspace)
    head = '[model]\nbase = "base"\nmodel = "restorer:build"\n\n[merge]\nmethod = "average"\n'
    (workspace / "retex.toml").write_text("\n".join([head, *entries]))


def _distance(base: Path, expert: Path) -> float:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (base, expert))
    square = sum(float((theirs[name] - ours[name]).square().sum()) for name in ours)
    return float((square / sum(float(tensor.square().sum()) for tensor in ours.values())) ** 0.5)


def _link(path: Path, target: Path) -> None:
    if path.is_symlink():
        path.unlink()
    path.symlink_to(target, target_is_directory=True)


def main() -> None:
    """Read the command line and make the family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--steps", type=int, default=2000, help="training steps of each expert")
    arguments = parser.parse_args()
    make(arguments.workspace, arguments.steps)


if __name__ == "__main__":
    main()
