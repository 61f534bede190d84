"""Fine-tune one expert from the base and keep it in the cache under the hash of its recipe."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from data import Split, Task, X, cache_dir
from torch import Tensor

Progress = Callable[[int, int, str], None]
Input_contra = TypeVar("Input_contra", contravariant=True)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides an expert's weights, apart from the machine's rounding."""

    task: str
    base: str
    seed: int
    steps: int
    batch_size: int
    learning_rate: float
    head_learning_rate: float
    warmup: int

    @property
    def folder(self) -> Path:
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]
        return cache_dir() / "experts" / f"{self.task}-{digest}"


class Learner(Protocol[Input_contra]):
    """A network with the base's weights and a new head, and how it reads inputs."""

    network: torch.nn.Module
    head: str
    """What the names of the new parameters begin with."""

    def logits(self, inputs: Sequence[Input_contra]) -> Tensor:
        """Float32 [n, classes]."""

    def save(self, folder: Path) -> None:
        """Weights, config and whatever reads inputs, as a checkpoint folder."""


@dataclass(frozen=True)
class Family(Generic[X]):
    """What a suite's kind of input decides; all else is the same for every suite.

    ``recipe(task, seed, steps)`` and ``learner(recipe, labels)`` say how experts come about; ``base()`` is the folder
    of the pre-trained network; ``write(path, rows, labels)`` writes data, unlabelled where ``labels`` is None.
    """

    tasks: Mapping[str, Task[X]]
    recipe: Callable[[str, int, int], Recipe]
    learner: Callable[[Recipe, Sequence[str]], Learner[X]]
    base: Callable[[], Path]
    write: Callable[[Path, Sequence[tuple[X, str]], Sequence[str] | None], None]
    suffix: str
    budget: str
    model: str
    """Lines under ``[model]`` in ``retex.toml``."""
    signatures: str
    """Lines under ``[signatures]``, beside ``samples``."""
    modules: tuple[Path, ...] = ()
    """Copied beside ``retex.toml``."""


def _batches(count: int, recipe: Recipe, generator: torch.Generator) -> list[list[int]]:
    """``steps`` batches drawn without replacement epoch by epoch."""
    order: list[int] = []
    while len(order) < recipe.steps * recipe.batch_size:
        order += torch.randperm(count, generator=generator).tolist()
    return [order[k * recipe.batch_size : (k + 1) * recipe.batch_size] for k in range(recipe.steps)]


def train(family: Family[X], recipe: Recipe, split: Split[X], progress: Progress) -> Learner[X]:
    """Full fine-tuning: AdamW without weight decay, linear warm-up and decay."""
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    labels = split.labels
    learner = family.learner(recipe, labels)
    model = learner.network
    head = [p for name, p in model.named_parameters() if name.startswith(learner.head)]
    body = [p for name, p in model.named_parameters() if not name.startswith(learner.head)]
    optimiser = torch.optim.AdamW(
        [{"params": body, "lr": recipe.learning_rate}, {"params": head, "lr": recipe.head_learning_rate}],
        weight_decay=0.0,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / recipe.warmup, (recipe.steps - step) / (recipe.steps - recipe.warmup))
    )
    model.train()
    average = math.nan
    for step, batch in enumerate(_batches(len(split.train), recipe, generator)):
        rows = [split.train[i] for i in batch]
        target = torch.tensor([labels.index(label) for _, label in rows])
        loss = torch.nn.functional.cross_entropy(learner.logits([given for given, _ in rows]), target)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        average = loss.item() if math.isnan(average) else 0.95 * average + 0.05 * loss.item()
        progress(step + 1, recipe.steps, f"loss {average:.3f}")
    model.eval()
    return learner


@torch.inference_mode()
def accuracy(learner: Learner[X], rows: Sequence[tuple[X, str]], labels: Sequence[str]) -> float:
    """Share of rows answered right, in batches of similar length."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    right = 0
    for start in range(0, len(rows), 128):
        part = [rows[i] for i in order[start : start + 128]]
        answers = learner.logits([given for given, _ in part]).argmax(-1).tolist()
        right += sum(labels[a] == label for a, (_, label) in zip(answers, part, strict=True))
    return right / len(rows)


def expert(family: Family[X], recipe: Recipe, split: Split[X], progress: Progress) -> tuple[Path, float]:
    """The expert's folder and its test accuracy, trained unless the cache has it."""
    folder = recipe.folder
    report = folder / "finetune.json"
    if not report.exists():
        learner = train(family, recipe, split, progress)
        score = accuracy(learner, split.test, split.labels)
        partial = folder.with_name(folder.name + f".partial-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        learner.save(partial)
        (partial / report.name).write_text(json.dumps({"recipe": asdict(recipe), "test_accuracy": score}, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    return folder, json.loads(report.read_text())["test_accuracy"]
