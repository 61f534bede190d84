"""Experts switched inside a loaded model: the bits of a fresh recovery, the same parameters, and back again."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification

import retex_cli
from retex_cli import Predictor, RetexError, UsageError

if TYPE_CHECKING:
    from tests.conftest import Retex

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ARTEFACTS = ("merged", "offsets.safetensors")


def holds(model: nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    """Whether the model has these tensors, bit by bit, in its own element types."""
    own = model.state_dict()
    return all(torch.equal(own[name].cpu(), value.to(own[name].dtype)) for name, value in expected.items())


def recovered(retex: Retex, *arguments: str) -> dict[str, torch.Tensor]:
    result = retex("recover", *arguments, "-o", "fresh.safetensors", "--overwrite", "--quiet")
    assert result.code == 0, result.err
    return load_file("fresh.safetensors")


def classifier(task: str) -> nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(f"experts/{task}")


@pytest.mark.parametrize("device", DEVICES)
def test_a_switched_model_has_the_bits_of_a_fresh_recovery(made: Path, retex: Retex, device: str) -> None:
    fresh = recovered(retex, "--task", "cars", "--device", device)
    model = classifier("cars").to(device)
    before = dict(model.named_parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    predictor = Predictor.load("merged", "offsets.safetensors", device=device)
    for _ in range(2):
        predictor.apply_(model, "cars")
        assert holds(model, fresh)
        predictor.apply_(model, None)
        merged = load_file("merged/model.safetensors")
        assert holds(model, {f"bert.{name}": value for name, value in merged.items()})
    assert all(value is before[name] for name, value in model.named_parameters())
    assert torch.equal(model.classifier.weight.cpu(), fresh["classifier.weight"]), "the merged model has no head"


def test_a_task_after_another_leaves_nothing_of_it(made: Path, retex: Retex) -> None:
    model = AutoModel.from_pretrained("merged")
    predictor = Predictor.load(*ARTEFACTS)
    for task in ("cars", "dtd", "cars"):
        predictor.apply_(model, task, head=False)
        fresh = recovered(retex, "--task", task)
        assert holds(model, {n.removeprefix("bert."): v for n, v in fresh.items() if n.startswith("bert.")})
        assert not holds(model, load_file("merged/model.safetensors"))


def test_a_mix_is_that_of_recover(made: Path, retex: Retex) -> None:
    predictor, mix = Predictor.load(*ARTEFACTS), {"dtd": 0.3, "cars": 0.7}
    model = classifier("cars")
    predictor.apply_(model, mix)
    assert holds(model, recovered(retex, "--mix", "cars=0.7,dtd=0.3"))
    model = classifier("dtd")
    predictor.apply_(model, mix, head="dtd")
    assert holds(model, recovered(retex, "--mix", "cars=0.7,dtd=0.3", "--head", "dtd"))


def test_another_element_type_holds_the_rounded_values(made: Path, retex: Retex) -> None:
    model = classifier("cars").to(torch.bfloat16)
    Predictor.load(*ARTEFACTS).apply_(model, "cars")
    assert model.classifier.weight.dtype == torch.bfloat16
    assert holds(model, recovered(retex, "--task", "cars"))


@pytest.mark.parametrize("fast", [False, True])
def test_bfloat16_experts_have_the_bits_of_a_fresh_recovery_and_are_rounded_once(
    tmp_path: Path, retex: Retex, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    base = {"w.weight": torch.randn(700, 900), "w.bias": torch.randn(700)}
    save_file({name: value.bfloat16() for name, value in base.items()}, "base.safetensors")
    for task in ("cars", "dtd"):
        expert = {name: (value + 0.05 * torch.randn(value.shape)).bfloat16() for name, value in base.items()}
        save_file(expert, f"{task}.safetensors")
    given = ("--expert", "cars=cars.safetensors", "--expert", "dtd=dtd.safetensors")
    assert retex("merge", "--base", "base.safetensors", *given, "-o", "merged.safetensors").code == 0
    assert retex("fit-offsets", "--merged", "merged.safetensors", *given, "--budget", "5%").code == 0
    whole = recovered(retex, "--merged", "merged.safetensors", "--task", "cars", "--dtype", "float32")
    monkeypatch.setattr("retex_cli.commands.offsets_file.has_fast_bf16", lambda device: fast)
    fresh = recovered(retex, "--merged", "merged.safetensors", "--task", "cars")
    rounded = {name: value.bfloat16() for name, value in whole.items()}
    assert fresh.keys() == rounded.keys()
    if fast:
        lost = (fresh["w.weight"].float() - whole["w.weight"]).norm()
        least = (rounded["w.weight"].float() - whole["w.weight"]).norm()
        assert least < lost < 1.05 * least
        assert torch.equal(fresh["w.bias"], rounded["w.bias"])
    else:
        assert all(torch.equal(fresh[name], rounded[name]) for name in fresh)
    predictor = Predictor.load("merged.safetensors", "offsets.safetensors")
    for dtype in (torch.bfloat16, torch.float32):
        model = nn.ModuleDict({"w": nn.Linear(900, 700)}).to(dtype)
        predictor.apply_(model, "cars")
        assert holds(model, fresh)


def test_a_head_needs_a_place_or_is_left_out(made: Path) -> None:
    predictor = Predictor.load(*ARTEFACTS)
    model = AutoModel.from_pretrained("merged")
    with pytest.raises(RetexError, match=r"'classifier\.bias' \[2\] has no place in BertModel"):
        predictor.apply_(model, "cars")
    assert holds(model, load_file("merged/model.safetensors")), "refused before anything was written"
    other = classifier("dtd")
    own = other.classifier.weight.clone()
    with pytest.raises(RetexError, match=r"'classifier\.bias' \[2\] has only a place of \[3\]"):
        predictor.apply_(other, "cars")
    predictor.apply_(other, "cars", head=False)
    assert torch.equal(other.classifier.weight, own)


def test_a_tensor_that_the_expert_lacks_is_named(made: Path) -> None:
    predictor, model = Predictor.load(*ARTEFACTS), classifier("cars")
    model.extra = nn.Linear(2, 2)
    with pytest.raises(RetexError, match=r"'extra\.weight', which expert 'cars' does not have"):
        predictor.apply_(model, "cars")
    predictor.apply_(model, "cars", head=False)


@pytest.mark.parametrize(
    ("expert", "words"),
    [("card", "no task 'card'"), ({"cars": 0.5, "dtd": 0.6}, "sum to 1.1"), ({"cars": 2.0, "dtd": -1.0}, "negative")],
)
def test_unclear_requests_are_refused(made: Path, expert: str | dict[str, float], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Predictor.load(*ARTEFACTS).apply_(classifier("cars"), expert)


def test_another_merged_checkpoint_is_refused(made: Path) -> None:
    tensors = load_file("merged/model.safetensors")
    tensors["encoder.layer.1.output.dense.weight"][0, 0] += 1e-4
    save_file(tensors, "merged/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RetexError, match=r"another merged checkpoint: tensor 'encoder.layer.1.output.dense.weight'"):
        Predictor.load(*ARTEFACTS)


def test_damage_is_pinned_to_its_task(made: Path, retex: Retex) -> None:
    data = bytearray(Path("offsets.safetensors").read_bytes())
    size = int.from_bytes(data[:8], "little")
    start, end = json.loads(data[8 : 8 + size])["offsets/cars"]["data_offsets"]
    data[8 + size + (start + end) // 2] ^= 0x40
    Path("offsets.safetensors").write_bytes(data)
    predictor, model = Predictor.load(*ARTEFACTS), classifier("dtd")
    predictor.apply_(model, "dtd")
    fresh = recovered(retex, "--task", "dtd")
    with pytest.raises(RetexError, match="the offsets of task 'cars' are damaged"):
        predictor.apply_(model, "cars", head="dtd")
    with pytest.raises(RetexError, match="the offsets of task 'cars' are damaged"):
        predictor.apply_(model, {"cars": 0.1, "dtd": 0.9})
    assert holds(model, fresh), "refused before anything was written"


def test_memory_is_the_merged_weights_once_and_the_factors_of_used_tasks(made: Path) -> None:
    predictor = Predictor.load(*ARTEFACTS)
    weights = sum(value.nbytes for value in load_file("merged/model.safetensors").values())
    assert predictor.nbytes == weights
    predictor.apply_(classifier("cars"), "cars")
    one = predictor.nbytes
    predictor.apply_(classifier("cars"), "cars")
    assert weights < one == predictor.nbytes


def test_several_threads_each_get_what_they_asked_for(made: Path, retex: Retex) -> None:
    fresh = {task: recovered(retex, "--task", task) for task in ("cars", "dtd")}
    predictor, wrong = Predictor.load(*ARTEFACTS), []

    def serve(task: str, model: nn.Module) -> None:
        for _ in range(5):
            predictor.apply_(model, None)
            predictor.apply_(model, task)
            if not holds(model, fresh[task]):
                wrong.append(task)

    # loaded here: transformers patches itself while it loads, and not for one thread alone
    work = [(task, classifier(task)) for task in ("cars", "dtd", "cars", "dtd")]
    threads = [threading.Thread(target=serve, args=each) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


class Tied(nn.Module):
    """Two names for one memory, a BatchNorm, and as many rows of a vocabulary as wanted."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(rows, 8)
        self.body = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.lm_head = nn.Linear(8, rows, bias=False)
        self.lm_head.weight = self.embed_tokens.weight


@pytest.fixture
def tied(tmp_path: Path, retex: Retex, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merged checkpoint of ``Tied(20)`` and offsets of experts "same" and "grown", which has 23 rows."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    base = {n: v for n, v in Tied(20).state_dict().items() if n != "lm_head.weight"}
    save_file(base, "base.safetensors")
    for name, rows in (("same", 20), ("grown", 23)):
        expert = {n: v + torch.rand_like(v) / 8 if v.is_floating_point() else v + 3 for n, v in base.items()}
        expert["embed_tokens.weight"] = torch.cat([expert["embed_tokens.weight"], torch.rand(rows - 20, 8)])
        save_file(expert, f"{name}.safetensors")
    given = ("--expert", "same=same.safetensors", "--expert", "grown=grown.safetensors")
    assert retex("merge", "--base", "base.safetensors", *given, "-o", "merged.safetensors").code == 0
    result = retex("fit-offsets", "--merged", "merged.safetensors", *given, "--budget", "40%")
    assert result.code == 0, result.err


@pytest.mark.parametrize(("task", "rows"), [("same", 20), ("grown", 23)])
def test_tied_weights_stay_tied_and_grown_rows_come_in(tied: None, retex: Retex, task: str, rows: int) -> None:
    fresh = recovered(retex, "--merged", "merged.safetensors", "--task", task)
    predictor, model = Predictor.load("merged.safetensors", "offsets.safetensors"), Tied(rows)
    predictor.apply_(model, task)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert holds(model, {**fresh, "lm_head.weight": fresh["embed_tokens.weight"]})
    predictor.apply_(model, None)
    merged = load_file("merged.safetensors")
    assert holds(model, {n: v for n, v in merged.items() if n != "embed_tokens.weight"})
    assert torch.equal(model.lm_head.weight[:20], merged["embed_tokens.weight"])
    assert torch.equal(model.lm_head.weight[20:], fresh["embed_tokens.weight"][20:])


def test_grown_rows_need_a_place_or_are_left_out(tied: None, retex: Retex) -> None:
    fresh = recovered(retex, "--merged", "merged.safetensors", "--task", "grown")
    predictor, model = Predictor.load("merged.safetensors", "offsets.safetensors"), Tied(20)
    with pytest.raises(RetexError, match=r"'embed_tokens\.weight' \[23, 8\] has only a place of \[20, 8\]"):
        predictor.apply_(model, "grown")
    predictor.apply_(model, "grown", head=False)
    assert torch.equal(model.lm_head.weight, fresh["embed_tokens.weight"][:20])


def test_only_what_is_there_can_be_imported() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Predicter'"):
        _ = retex_cli.Predicter
