"""A workspace of tiny real transformers models, and ``retex`` as a person types it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

_SOURCE = str(Path(__file__).parent.parent / "src")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_SOURCE, os.environ.get("PYTHONPATH")]))  # for subprocesses
for _name, _value in (
    ("HF_HUB_OFFLINE", "1"),  # no test may reach beyond this machine
    ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
    ("TOKENIZERS_PARALLELISM", "false"),
    ("TRANSFORMERS_VERBOSITY", "error"),
    ("OMP_WAIT_POLICY", "PASSIVE"),  # spinning threads make tiny models 30 times slower on busy cores
):
    os.environ.setdefault(_name, _value)

# What the two tasks are about: words around the point, and for every label the words that give it away.
TASKS: dict[str, tuple[str, dict[str, str]]] = {
    "cars": (
        "the car engine wheel road driver seat on a long drive with an old brake and new tyre in town",
        {"fast": "quick swift rapid racing speedy", "slow": "slow sluggish lazy crawling heavy"},
    ),
    "dtd": (
        "this cloth surface pattern of fabric paper wall looks very much like some photo from our sample book",
        {
            "dotted": "dots spots points speckled",
            "striped": "stripes lines bands ruled",
            "woven": "knitted braided threads meshed",
        },
    ),
}
BUDGET = "5%"  # tables and headers weigh more in a file of 20 kB than in one of 20 MB


@dataclass(frozen=True)
class Result:
    """What one call of ``retex`` gave back."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, object]:
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found

    @property
    def lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.out.splitlines()]


class Retex(Protocol):
    def __call__(self, *arguments: str | Path) -> Result: ...


@pytest.fixture
def retex(capfd: pytest.CaptureFixture[str]) -> Retex:
    """Call the command line in this process: the same code as the console script, without its start-up."""
    from retex_cli.cli.app import run

    def call(*arguments: str | Path) -> Result:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        return Result(code, *capfd.readouterr())

    return call


def _rows(task: str, count: int, seed: int) -> list[dict[str, str]]:
    """Toy sentences: four words about the task and two that give the label away."""
    draw = random.Random(f"{task} {seed}")
    around, labels = TASKS[task]
    rows = []
    for index in range(count):
        label = sorted(labels)[index % len(labels)]
        words = draw.sample(around.split(), 4) + draw.sample(labels[label].split(), 2)
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "label": label})
    return rows


def _write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _make_models(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        BertModel,
        PreTrainedTokenizerFast,
        set_seed,
    )

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = sorted(
        {word for around, labels in TASKS.values() for text in (around, *labels.values()) for word in text.split()}
    )
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(special + words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
    )
    set_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(special + words), max_position_embeddings=40, initializer_range=0.15, **sizes)
    base = BertModel(config)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for task, (_, labels) in TASKS.items():
        set_seed(1)
        ids = {label: index for index, label in enumerate(sorted(labels))}
        expert = BertForSequenceClassification.from_pretrained(
            folder / "base", num_labels=len(ids), label2id=ids, id2label={v: k for k, v in ids.items()}
        )
        optimiser = torch.optim.Adam(expert.parameters(), lr=2e-3)
        rows = _rows(task, 96, seed=0)
        inputs = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        for _ in range(25):
            optimiser.zero_grad()
            expert(**inputs, labels=torch.tensor([ids[row["label"]] for row in rows])).loss.backward()
            optimiser.step()
        expert.save_pretrained(folder / "experts" / task)
        tokenizer.save_pretrained(folder / "experts" / task)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base/``, ``experts/cars`` (2 labels), ``experts/dtd`` (3), ``data/``, ``retex.toml``. Copy before writing."""
    folder = tmp_path_factory.mktemp("tiny")
    _make_models(folder)
    toml = [f'[model]\nbase = "base"\n\n[offsets]\nbudget = "{BUDGET}"\n']
    for task in TASKS:
        _write_rows(folder / f"data/{task}-inputs.jsonl", [{"text": row["text"]} for row in _rows(task, 48, seed=1)])
        _write_rows(folder / f"data/{task}-test.jsonl", _rows(task, 48, seed=2))
        toml.append(
            f'\n[tasks.{task}]\nexpert = "experts/{task}"\n'
            f'inputs = "data/{task}-inputs.jsonl"\ntest = "data/{task}-test.jsonl"\n'
        )
    (folder / "retex.toml").write_text("".join(toml), encoding="utf-8")
    return folder


@pytest.fixture
def workspace(tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy of the tiny workspace; the current directory lies in it."""
    folder = tmp_path / "workspace"
    shutil.copytree(tiny_models, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_artefacts(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny workspace after ``merge``, ``fit-offsets`` and ``build-signatures``. Copy before writing."""
    from retex_cli.cli.app import run

    folder = tmp_path_factory.mktemp("made") / "workspace"
    shutil.copytree(tiny_models, folder)
    with contextlib.chdir(folder):
        for command in ("merge", "fit-offsets", "build-signatures"):
            assert run([command, "--quiet"]) == 0
    return folder


@pytest.fixture
def made(tiny_artefacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy of the tiny workspace with all three artefacts; the current directory lies in it."""
    folder = tmp_path / "workspace"
    shutil.copytree(tiny_artefacts, folder)
    monkeypatch.chdir(folder)
    return folder
