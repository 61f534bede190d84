"""Fine-tune one expert from the base and keep it in the cache under the hash of its recipe."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tasks import BASE_PACKAGE, Row, Split, Task, base_model, cache_dir
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides an expert's weights, apart from the machine's rounding."""

    task: str
    seed: int = 0
    steps: int = 200
    batch_size: int = 16
    max_length: int = 48
    learning_rate: float = 1e-4
    head_learning_rate: float = 3e-3
    warmup: int = 20
    base: str = BASE_PACKAGE

    @property
    def folder(self) -> Path:
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]
        return cache_dir() / "experts" / f"{self.task}-{digest}"


def _batches(count: int, recipe: Recipe, generator: torch.Generator) -> list[list[int]]:
    """``steps`` batches drawn without replacement epoch by epoch."""
    order: list[int] = []
    while len(order) < recipe.steps * recipe.batch_size:
        order += torch.randperm(count, generator=generator).tolist()
    return [order[k * recipe.batch_size : (k + 1) * recipe.batch_size] for k in range(recipe.steps)]


def train(recipe: Recipe, split: Split, progress: Progress) -> tuple[torch.nn.Module, AutoTokenizer]:
    """Full fine-tuning: AdamW without weight decay, linear warm-up and decay, bf16 autocast."""
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    labels = split.labels
    tokenizer = AutoTokenizer.from_pretrained(base_model(), model_max_length=recipe.max_length)
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # "newly initialised: classifier" is the point here
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = AutoModelForSequenceClassification.from_pretrained(
        base_model(), id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)}
    )
    transformers_logging.set_verbosity(level)
    head = [p for name, p in model.named_parameters() if name.startswith("classifier.")]
    body = [p for name, p in model.named_parameters() if not name.startswith("classifier.")]
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
        inputs = tokenizer([text for text, _ in rows], truncation=True, padding=True, return_tensors="pt")
        target = torch.tensor([labels.index(label) for _, label in rows])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(**inputs).logits.float(), target)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        average = loss.item() if math.isnan(average) else 0.95 * average + 0.05 * loss.item()
        progress(step + 1, recipe.steps, f"loss {average:.3f}")
    return model.eval(), tokenizer


@torch.inference_mode()
def accuracy(model: torch.nn.Module, tokenizer: AutoTokenizer, rows: list[Row], labels: list[str]) -> float:
    """Share of rows answered right, in batches of similar length."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    right = 0
    for start in range(0, len(rows), 128):
        part = [rows[i] for i in order[start : start + 128]]
        inputs = tokenizer([text for text, _ in part], truncation=True, padding=True, return_tensors="pt")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            answers = model(**inputs).logits.argmax(-1).tolist()
        right += sum(labels[a] == label for a, (_, label) in zip(answers, part, strict=True))
    return right / len(rows)


def expert(task: Task, recipe: Recipe, split: Split, progress: Progress) -> tuple[Path, float]:
    """The expert's folder and its test accuracy, trained unless the cache has it."""
    folder = recipe.folder
    report = folder / "finetune.json"
    if not report.exists():
        model, tokenizer = train(recipe, split, progress)
        score = accuracy(model, tokenizer, split.test, split.labels)
        partial = folder.with_name(folder.name + f".partial-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / report.name).write_text(json.dumps({"recipe": asdict(recipe), "test_accuracy": score}, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    return folder, json.loads(report.read_text())["test_accuracy"]
