"""Mixed inputs answered by their own experts: what recovered experts answer, in order, from any thread."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import retex_cli
from retex_cli import Experts, RetexError, UsageError
from retex_cli.commands import experts as commands
from retex_cli.commands.experts import Reply
from retex_cli.io.inputs import Example
from retex_cli.models.network import Network
from retex_cli.models.passes import Passed

if TYPE_CHECKING:
    from tests.conftest import Retex

ARTEFACTS = ("merged", "offsets.safetensors", "signatures.safetensors")
TASKS = ("cars", "dtd")


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 everywhere, so that results can be compared closely."""
    monkeypatch.setattr("retex_cli.models.network.has_fast_bf16", lambda device: False)


def texts(task: str) -> list[str]:
    return [json.loads(line)["text"] for line in Path(f"data/{task}-test.jsonl").read_text().splitlines()]


def mixed() -> list[str]:
    return [text for pair in zip(texts("cars"), texts("dtd"), strict=True) for text in pair]


def recovered_logits(retex: Retex, task: str, inputs: list[str]) -> torch.Tensor:
    """One by one, by the expert that ``retex recover`` writes."""
    assert retex("recover", "--task", task, "-o", f"{task}/", "--overwrite", "--quiet").code == 0
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(task), AutoTokenizer.from_pretrained(task)
    with torch.no_grad():
        return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in inputs])


def test_every_input_is_answered_by_its_own_expert_in_order(made: Path, retex: Retex) -> None:
    experts, inputs = Experts.load(*ARTEFACTS, blend=False), mixed()
    assert experts.tasks == TASKS
    found = retex("identify", *inputs, "--json").lines
    for _ in range(2):  # the second call finds the experts of the first
        replies = experts(inputs)
        assert [reply.task for reply in replies] == [one["task"] for one in found]
        assert [reply.unknown for reply in replies] == [one["unknown"] for one in found]
        assert [reply.shares for reply in replies] == [{reply.task: 1.0} for reply in replies]
        for task in TASKS:
            mine = [k for k, reply in enumerate(replies) if reply.task == task]
            assert len(mine) > 40
            expected = recovered_logits(retex, task, [inputs[k] for k in mine])
            torch.testing.assert_close(torch.stack([replies[k].logits for k in mine]), expected, atol=1e-4, rtol=1e-4)
            names = json.loads(Path(f"{task}/config.json").read_text())["id2label"]
            assert [replies[k].label for k in mine] == [names[str(i)] for i in expected.argmax(1).tolist()]


def test_bad_inputs_have_their_reason_and_the_others_go_on(made: Path) -> None:
    experts = Experts.load(*ARTEFACTS)
    good = mixed()[:2]
    whole = experts(good)
    tokens = {"input_ids": torch.tensor([2, 5, 9999, 3])}
    array = np.zeros((4, 4), np.float32)
    replies = experts([" ", good[0], Path("photo.png"), array, 7, tokens, good[1]])  # type: ignore[list-item]
    words = [None if reply.error is None else reply.error.message for reply in replies]
    assert words[0] == "inputs[0]: the text is ' '"
    assert words[2] == "inputs[2]: an image, and merged reads texts"
    assert words[3] == "inputs[3]: an array of float32 [4, 4]"
    assert words[4] == "inputs[4]: int is no input"
    assert words[5] is not None
    assert words[5].startswith("inputs[5]: merged cannot take this input (input_ids [4]): IndexError")
    for reply, one in zip((replies[1], replies[6]), whole, strict=True):
        assert (reply.task, reply.label, reply.error) == (one.task, one.label, None)
        torch.testing.assert_close(reply.logits, one.logits, atol=1e-5, rtol=1e-5)
    assert all(reply.label is None and reply.logits is None for reply in (replies[0], replies[5]))


def by_hand(reply: Reply, text: str) -> tuple[str, str, torch.Tensor]:
    """Label, task and logits by every expert that was asked, switched by itself: no label name has two tasks here."""
    tokenizer, predictor = AutoTokenizer.from_pretrained("merged"), retex_cli.Predictor.load(*ARTEFACTS[:2])
    found = []
    for task, share in reply.shares.items():
        model = AutoModelForSequenceClassification.from_pretrained(f"experts/{task}").eval()
        predictor.apply_(model, task)
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        best = int(logits.argmax())
        found.append((share * float(logits.softmax(0)[best]), model.config.id2label[best], task, logits))
    return max(found, key=lambda one: one[0])[1:]


def test_several_experts_answer_inputs_whose_task_is_unsure(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torn = ["new on in very like lazy", "driver wheel town this wall cloth knitted", "a pattern quick spots knitted"]
    inputs = [*mixed()[:40], *torn]
    alone = Experts.load(*ARTEFACTS, blend=False)(inputs)
    limit = sorted(reply.probability for reply in alone)[15]
    monkeypatch.setattr("retex_cli.signatures.signatures.UNSURE", limit)
    experts = Experts.load(*ARTEFACTS)
    replies = experts(inputs)
    unsure = [k for k, reply in enumerate(alone) if reply.probability < limit]
    assert any(replies[k].task != alone[k].task for k in unsure), "a label of the other task is more probable"
    for k, (reply, one) in enumerate(zip(replies, alone, strict=True)):
        same = ("probability", "margin", "unknown", "error")
        assert [getattr(reply, name) for name in same] == [getattr(one, name) for name in same]
        if k in unsure:
            assert sorted(reply.shares) == list(TASKS)
            assert sum(reply.shares.values()) == pytest.approx(1)
            assert max(reply.shares, key=reply.shares.__getitem__) == one.task
            label, task, logits = by_hand(reply, inputs[k])
            assert (reply.label, reply.task) == (label, task)
            torch.testing.assert_close(reply.logits, logits, atol=1e-4, rtol=1e-4)
        else:
            assert (reply.task, reply.label, reply.shares) == (one.task, one.label, {one.task: 1.0})
            torch.testing.assert_close(reply.logits, one.logits, atol=1e-4, rtol=1e-4)
    again = experts(["", inputs[unsure[-1]], 7, *inputs[:2]])  # type: ignore[list-item]
    assert [reply.error is None for reply in again] == [False, True, False, True, True]
    assert (again[1].task, again[1].label) == (replies[unsure[-1]].task, replies[unsure[-1]].label)


def test_an_expert_is_switched_to_once_whoever_asks_it(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retex_cli.signatures.signatures.UNSURE", 1.01)
    experts, switched = Experts.load(*ARTEFACTS), []
    whole = retex_cli.Predictor.apply_

    def counted(self: retex_cli.Predictor, model: torch.nn.Module, expert: str, **more: bool) -> None:
        switched.append(expert)
        whole(self, model, expert, **more)

    monkeypatch.setattr(retex_cli.Predictor, "apply_", counted)
    experts(mixed()[:6])
    experts(mixed()[:6])
    assert switched == ["cars", "dtd", "cars"], "the expert at hand goes first"


def test_an_input_that_one_of_its_experts_cannot_take_is_answered_by_the_others(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retex_cli.signatures.signatures.UNSURE", 1.01)
    whole = commands.answer

    def refusing(network: Network, examples: Sequence[Example], *rest: object) -> Passed:
        passed = whole(network, examples, *rest)
        bad = range(len(examples)) if "dotted" not in network.labels else range(1)
        kept = [k for k in passed.kept if k not in bad]
        return Passed(passed.values[kept], kept, {k: RetexError(f"not {k}") for k in bad})

    monkeypatch.setattr(commands, "answer", refusing)
    first, second = Experts.load(*ARTEFACTS)(mixed()[:2])
    assert (first.label, str(first.error)) == (None, "not 0")
    assert (second.task, second.error) == ("dtd", None)


def test_tokenised_inputs_are_answered_as_their_texts(made: Path) -> None:
    experts, inputs = Experts.load(*ARTEFACTS), mixed()[:6]
    tokenizer = AutoTokenizer.from_pretrained("merged")
    ready = [{n: v[0] for n, v in tokenizer(text, return_tensors="pt").items()} for text in inputs]
    for one, other in zip(experts(inputs), experts(ready), strict=True):
        assert (one.task, one.label) == (other.task, other.label)
        torch.testing.assert_close(one.logits, other.logits, atol=1e-4, rtol=1e-4)


def test_several_threads_get_what_one_gets(made: Path) -> None:
    experts, inputs = Experts.load(*ARTEFACTS), mixed()
    calls = [inputs[k : k + 8] for k in range(0, 64, 8)]
    calls[3] = ["", *calls[3]]
    expected = [experts(call) for call in calls]
    wrong: list[int] = []

    def serve(first: int) -> None:
        for turn in range(3 * len(calls)):
            k = (first + turn) % len(calls)
            for one, other in zip(experts(calls[k]), expected[k], strict=True):
                same = (one.task, one.label, one.probability) == (other.task, other.label, other.probability)
                bits = one.logits is other.logits or torch.equal(one.logits, other.logits)
                if not same or not bits:
                    wrong.append(k)

    threads = [threading.Thread(target=serve, args=(first,)) for first in (0, 3, 5, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_memory_is_two_sets_of_weights_the_heads_and_the_offsets(made: Path) -> None:
    experts = Experts.load(*ARTEFACTS)
    before = experts.nbytes
    predictor = retex_cli.Predictor.load(*ARTEFACTS[:2])
    weights = predictor.nbytes
    model = AutoModelForSequenceClassification.from_pretrained("experts/cars")
    for task in TASKS:
        predictor.apply_(model, task, head=False)
    heads = 4 * 32 * 5 + 4 * 5
    assert before <= predictor.nbytes + weights + heads + 1000, "tasks share all but their heads"
    experts(mixed())
    assert experts.nbytes == before


def test_a_failed_switch_leaves_no_half_expert_behind(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experts, inputs = Experts.load(*ARTEFACTS), mixed()[:8]
    expected = experts(inputs)
    whole = retex_cli.Predictor.apply_

    def half(self: object, model: torch.nn.Module, *rest: object, **more: object) -> None:
        with torch.no_grad():
            next(model.parameters()).fill_(0)
        raise MemoryError

    monkeypatch.setattr(retex_cli.Predictor, "apply_", half)
    with pytest.raises(MemoryError):
        experts(inputs)
    monkeypatch.setattr(retex_cli.Predictor, "apply_", whole)
    assert [reply.label for reply in experts(inputs)] == [reply.label for reply in expected]


def test_what_does_not_belong_together_is_refused(made: Path, retex: Retex) -> None:
    with pytest.raises(UsageError, match="one text is no list"):
        Experts.load(*ARTEFACTS)("a car")
    assert Experts.load(*ARTEFACTS)([]) == []
    given = ("--expert", "cars=experts/cars", "-o", "cars-only.safetensors")
    assert retex("fit-offsets", "--merged", "merged", *given, "-w", "nowhere").code == 2
    Path("retex.toml").unlink()
    assert retex("fit-offsets", "--merged", "merged", *given, "--budget", "5%").code == 0
    with pytest.raises(RetexError, match=r"can identify task 'dtd', which cars-only\.safetensors does not"):
        Experts.load("merged", "cars-only.safetensors", "signatures.safetensors")
    with pytest.raises(RetexError, match="another"):
        Experts.load("base", *ARTEFACTS[1:])
