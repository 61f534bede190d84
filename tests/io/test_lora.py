from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from retex_cli.errors import RetexError
from retex_cli.io import lora
from retex_cli.io.align import align
from retex_cli.io.checkpoint import Checkpoint, open_checkpoint, open_expert

MakeModel = Callable[..., Path]
PREFIX = "base_model.model."
A, B = torch.randn(2, 6, generator=torch.Generator().manual_seed(1)), torch.tensor([[1.0, 2.0]] * 4)


def adapter(folder: Path, tensors: dict[str, torch.Tensor], **settings: object) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({PREFIX + name: tensor.clone() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 4, **settings}))
    return folder


def factors(module: str = "layer.q", a: torch.Tensor = A, b: torch.Tensor = B) -> dict[str, torch.Tensor]:
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


@pytest.fixture
def base(make_model: MakeModel) -> Checkpoint:
    tensors = {"layer.q.weight": torch.randn(4, 6), "layer.q.bias": torch.randn(4), "norm.weight": torch.randn(6)}
    return open_checkpoint(make_model("base", tensors, {"architectures": ["BertModel"], "hidden_size": 6}))


def test_a_weight_with_factors_is_base_plus_scaled_product(base: Checkpoint, tmp_path: Path) -> None:
    expert = open_expert(adapter(tmp_path / "a", factors()), base)
    expected = base.read("layer.q.weight") + 2.0 * B @ A  # alpha 4, rank 2
    assert torch.allclose(expert.read("layer.q.weight"), expected, atol=1e-6)
    assert not torch.equal(expert.read("layer.q.weight"), base.read("layer.q.weight"))
    assert torch.equal(expert.read("norm.weight"), base.read("norm.weight"))
    assert list(expert.tensors) == list(base.tensors)
    assert expert.files == (tmp_path / "a/adapter_model.safetensors",)
    assert expert.tensors["layer.q.weight"].file == expert.files[0]
    assert expert.tensors["norm.weight"].file == base.files[0]


def test_low_rank_gives_the_factors_and_none_elsewhere(base: Checkpoint, tmp_path: Path) -> None:
    expert = open_expert(adapter(tmp_path / "a", factors()), base)
    found = expert.low_rank("layer.q.weight")
    assert found is not None
    b, a, scaling = found
    assert torch.equal(b, B)
    assert torch.equal(a, A)
    assert scaling == 2.0
    assert expert.low_rank("norm.weight") is None


@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float64])
def test_any_chunking_and_thread_count_gives_the_same_bits(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: torch.dtype
) -> None:
    monkeypatch.setattr(lora, "_BLOCK", 700)  # 7 rows at a time
    tensors = {"w.weight": torch.randn(50, 100).bfloat16()}
    low = factors("w", torch.randn(3, 100), torch.randn(50, 3))
    expert = open_expert(adapter(tmp_path / "a", low), open_checkpoint(make_model("base", tensors)))
    whole = torch.empty(5000, dtype=wanted)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        expert.read_into("w.weight", 0, whole)
        torch.set_num_threads(1)
        for step in (1, 99, 100, 701, 4999):
            pieces = torch.empty(5000, dtype=wanted)
            for start in range(0, 5000, max(step, 97)):
                expert.read_into("w.weight", start, pieces[start : start + max(step, 97)])
            assert torch.equal(pieces, whole)
    finally:
        torch.set_num_threads(threads)
    exact = tensors["w.weight"].double() + 4 / 3 * low["w.lora_B.weight"].double() @ low["w.lora_A.weight"].double()
    rounding = 2**-8 if wanted is torch.bfloat16 else 1e-6
    assert torch.allclose(whole.double(), exact.flatten(), rtol=rounding, atol=1e-5)


def test_the_type_is_the_wider_of_base_and_factors(make_model: MakeModel, tmp_path: Path) -> None:
    base = open_checkpoint(make_model("base", {"layer.q.weight": torch.randn(4, 6).bfloat16()}))
    expert = open_expert(adapter(tmp_path / "a", factors()), base)
    assert expert.tensors["layer.q.weight"].dtype == expert.read("layer.q.weight").dtype == torch.float32
    half = {name: tensor.bfloat16() for name, tensor in factors().items()}
    expert = open_expert(adapter(tmp_path / "b", half), base)
    assert expert.tensors["layer.q.weight"].dtype == torch.bfloat16


def test_scaling_follows_alpha_rank_rslora_and_patterns(make_model: MakeModel, tmp_path: Path) -> None:
    base = open_checkpoint(make_model("base", {f"layer.{n}.weight": torch.zeros(4, 6) for n in "qkv"}))
    three = {**factors("layer.q"), **factors("layer.k"), **factors("layer.v", A[:1], B[:, :1])}
    expert = open_expert(adapter(tmp_path / "a", three, alpha_pattern={"k": 10, "^layer.x": 9}), base)
    found = [low[2] for name in "qkv" if (low := expert.low_rank(f"layer.{name}.weight"))]
    assert found == [4 / 2, 10 / 2, 4 / 1]
    expert = open_expert(adapter(tmp_path / "a", three, use_rslora=True), base)
    low = expert.low_rank("layer.q.weight")
    assert low is not None
    assert low[2] == 4 / math.sqrt(2)


def test_a_bare_base_and_an_adapter_of_its_classifier(base: Checkpoint, tmp_path: Path) -> None:
    low = {**factors("bert.layer.q"), "classifier.weight": torch.ones(3, 6), "classifier.bias": torch.ones(3)}
    folder = adapter(tmp_path / "a", low, task_type="SEQ_CLS", modules_to_save=["classifier"])
    (folder / "tokenizer.json").write_text("{}")
    expert = open_expert(folder, base)
    found = align(base, expert)
    assert found.prefix == ("", "bert.")
    assert found.shared == {name: f"bert.{name}" for name in base.tensors}
    assert set(found.task) == {"classifier.weight", "classifier.bias"}
    assert torch.equal(expert.read("classifier.weight"), torch.ones(3, 6))
    assert expert.config is not None
    assert expert.config["architectures"] == ["BertForSequenceClassification"]
    assert len(expert.config["id2label"]) == 3  # type: ignore[arg-type]
    assert base.config is not None
    assert base.config["architectures"] == ["BertModel"]
    assert list(expert.side_files()) == ["tokenizer.json"]


def test_tensors_that_were_trained_whole_replace_the_base_s(base: Checkpoint, tmp_path: Path) -> None:
    low = {
        **factors(),
        "layer.q.bias": torch.ones(4),
        "norm.modules_to_save.weight": torch.ones(6),
        "layer.q.base_layer.weight": torch.ones(4, 6),
    }
    expert = open_expert(adapter(tmp_path / "a", low), base)
    assert torch.equal(expert.read("layer.q.bias"), torch.ones(4))
    assert torch.equal(expert.read("norm.weight"), torch.ones(6))
    assert torch.allclose(expert.read("layer.q.weight"), torch.ones(4, 6) + 2 * B @ A)
    assert list(expert.tensors) == list(base.tensors)


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        (factors(), {"peft_type": "IA3"}, "an adapter of the type 'IA3'"),
        (factors(), {"use_dora": True}, "uses use_dora"),
        (factors(), {"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        (factors(), {"lora_alpha": None}, "lora_alpha is None"),
        (factors("layer.z"), {}, r"changes the tensor 'layer\.z\.weight', which the base .* lacks"),
        (factors(b=B[:3]), {}, r"changes 'layer\.q\.weight' with the shape \[3, 6\], in the base .* \[4, 6\]"),
        (factors(a=A[:1]), {}, r"the factors of 'layer\.q' do not fit: .*\[1, 6\].*\[4, 2\]"),
        ({"layer.q.lora_A.weight": A}, {}, r"'layer\.q' has no lora_B"),
        ({**factors(), "layer.q.lora_magnitude_vector": A[0]}, {}, "lora_magnitude_vector' is not of a plain LoRA"),
    ],
)
def test_what_is_not_plain_lora_for_this_base_is_refused(
    base: Checkpoint, tmp_path: Path, tensors: dict[str, torch.Tensor], settings: dict[str, object], message: str
) -> None:
    with pytest.raises(RetexError, match=message) as caught:
        open_expert(adapter(tmp_path / "a", tensors, **settings), base)
    assert str(tmp_path / "a") in caught.value.message


class Small(nn.Module):
    """One of each kind of layer that LoRA changes."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embed = nn.Embedding(11, 6)
        self.linear = nn.Linear(6, 8)
        self.turned = Conv1D(5, 8)  # type: ignore[no-untyped-call]
        self.picture = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(5, 2)


@pytest.mark.parametrize(
    ("targets", "fan"), [(["embed", "linear", "picture"], False), (["turned"], True), (["linear"], False)]
)
def test_every_kind_of_layer_is_what_peft_makes_of_it(tmp_path: Path, targets: list[str], fan: bool) -> None:
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(0)
    model = Small()
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "base.safetensors")
    config = LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=targets,
        fan_in_fan_out=fan,
        modules_to_save=["head"],
        init_lora_weights=False,
        rank_pattern={targets[0]: 2},
        alpha_pattern={targets[0]: 5},
    )
    tuned = get_peft_model(model, config)
    for name, parameter in tuned.named_parameters():
        if name.endswith("head.modules_to_save.default.weight"):
            parameter.data.add_(1.0)
    folder = tmp_path / "adapter"
    folder.mkdir()
    state = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "adapter_model.safetensors")
    config.inference_mode = True
    config.save_pretrained(str(folder))
    expected = tuned.merge_and_unload().state_dict()
    with open_checkpoint(tmp_path / "base.safetensors") as base, open_expert(folder, base) as expert:
        assert set(expert.tensors) == set(expected)
        for name, tensor in expected.items():
            assert torch.allclose(expert.read(name), tensor, atol=1e-6), name
        changed = {name for name in expected if not torch.equal(expert.read(name), base.read(name))}
        assert changed == {f"{target}.weight" for target in targets} | {"head.weight"}
