"""Pictures: identified by a transformers model of images, and answered by its experts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from retex_cli import Experts

if TYPE_CHECKING:
    from tests.conftest import Retex


def picture(path: Path, seed: int, *, bars: bool) -> None:
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 90, (24, 20, 3), np.uint8)
    if bars:
        pixels[:, draw.integers(0, 20, 4)] += np.uint8(150)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def signed(tmp_path: Path, retex: Retex, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny vision transformer in ``merged/`` and signatures of pictures with and without bars."""
    from transformers import ViTConfig, ViTModel, set_seed

    monkeypatch.chdir(tmp_path)
    set_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ViTModel(ViTConfig(image_size=16, patch_size=8, initializer_range=0.3, **sizes)).save_pretrained("merged")
    Path("merged/preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}})
    )
    for task in ("bars", "plain"):
        for n in range(40):
            picture(tmp_path / task / f"{n:02}.png", n, bars=task == "bars")
    result = retex("build-signatures", "--merged", "merged", "--inputs", "bars=bars", "--inputs", "plain=plain")
    assert result.code == 0, result.err
    return tmp_path


def test_pictures_of_a_folder_and_bad_ones_among_them(signed: Path, retex: Retex) -> None:
    for n in range(8):
        picture(signed / "new" / f"{n}.png", 100 + n, bars=n < 4)
    (signed / "new" / "cut.png").write_bytes((signed / "new" / "0.png").read_bytes()[:200])
    result = retex("identify", "new", "of some words", "--signatures", "signatures.safetensors", "--json")
    assert result.code == 1
    *answers, failure = result.lines
    assert failure["error"] == "2 of 10 inputs could not be used"
    assert [answer.get("task") for answer in answers] == ["bars"] * 4 + ["plain"] * 4 + [None] * 2
    assert "cut.png: not a readable image" in answers[8]["error"]
    assert answers[9]["error"] == "'of some words': a text, and merged reads images"


def test_experts_answer_pictures_by_path_and_by_array(signed: Path, retex: Retex) -> None:
    from transformers import ViTForImageClassification, set_seed

    given = []
    for seed, (task, labels) in enumerate({"bars": ["red", "blue"], "plain": ["x", "y", "z"]}.items()):
        set_seed(seed + 1)
        names = dict(enumerate(labels))
        expert = ViTForImageClassification.from_pretrained("merged", num_labels=len(names), id2label=names)
        with torch.no_grad():
            expert.vit.layernorm.bias.add_(torch.randn(16) / 4)
        expert.save_pretrained(f"experts/{task}")
        shutil.copy("merged/preprocessor_config.json", f"experts/{task}")
        given += ["--expert", f"{task}=experts/{task}"]
    assert retex("fit-offsets", "--merged", "merged", *given, "--budget", "20%").code == 0
    experts = Experts.load("merged", "offsets.safetensors", "signatures.safetensors")
    array = np.asarray(Image.open("plain/03.png"))
    replies = experts(["bars/01.png", array, Path("gone.png"), signed / "bars/02.png", "plain/03.png"])
    assert [reply.task for reply in replies] == ["bars", "plain", None, "bars", "plain"]
    assert "inputs[2]: not a readable image" in str(replies[2].error)
    torch.testing.assert_close(replies[1].logits, replies[4].logits)  # a product's bits depend on the place in a batch
    for k, task, path in ((0, "bars", "bars/01.png"), (4, "plain", "plain/03.png")):
        assert retex("recover", "--task", task, "-o", f"back/{task}/").code == 0
        model = ViTForImageClassification.from_pretrained(f"back/{task}")
        pixels = torch.from_numpy(np.array(Image.open(path).resize((16, 16), Image.Resampling.BILINEAR))).float()
        with torch.no_grad():
            logits = model(pixel_values=(pixels.permute(2, 0, 1)[None] / 255 - 0.5) / 0.5).logits[0]
        torch.testing.assert_close(replies[k].logits, logits, atol=5e-2, rtol=5e-2)
        assert replies[k].label == model.config.id2label[int(logits.argmax())]
