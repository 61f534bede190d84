"""``retex identify``: one answer an input in order; bad inputs are lost by themselves and named."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

import retex_cli
from retex_cli.commands.identifier import shapes_of
from retex_cli.commands.identify import FIRST, LARGEST, windows
from retex_cli.io.inputs import Example

if TYPE_CHECKING:
    from tests.conftest import Retex

CAR, CLOTH = "the engine of a rapid car", "dots on this fabric surface"


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> io.BytesIO:
    """Standard input, to be written to and set back to its start."""
    stream = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stream))
    return stream


def test_a_line_for_every_input_in_order(made: Path, retex: Retex) -> None:
    result = retex("identify", CAR, CLOTH, "data/cars-test.jsonl")
    assert result.code == 0, result.err
    lines = [line.split("\t") for line in result.out.splitlines()]
    assert len(lines) == 50
    assert [line[3] for line in lines[:3]] == [repr(CAR), repr(CLOTH), "data/cars-test.jsonl:1"]
    assert [line[0] for line in lines[:2]] == ["cars", "dtd"]
    for task, probability, margin, *_ in lines:
        assert task in ("cars", "dtd", "unknown")
        assert 50 <= float(probability.removesuffix(" %")) <= 100
        assert float(margin) >= 0


def test_an_input_like_none_of_the_tasks_is_unknown_and_the_nearest_is_said(made: Path, retex: Retex) -> None:
    strange = "car car car car car car car car"
    found = retex("identify", strange, "--json").lines[0]
    assert found["unknown"] is True
    line = retex("identify", strange).out.rstrip("\n").split("\t")
    assert (line[0], line[4]) == ("unknown", f"nearest {found['task']}")


def test_json_is_a_line_an_input_and_bad_ones_stand_in_their_place(made: Path, retex: Retex, typed: io.BytesIO) -> None:
    typed.write(f'{CAR}\n\n{{"text": "{CLOTH}"}}\n{{"text": 3}}\n\xff\n{CAR}\n'.encode("latin-1"))
    typed.seek(0)
    result = retex("identify", "-", "gone.jsonl", "--json")
    assert result.code == 1
    *answers, failure = result.lines
    assert [answer.get("task") for answer in answers] == ["cars", None, "dtd", None, None, "cars", None]
    assert set(answers[0]) == {"source", "task", "probability", "margin", "unknown", "embedding"}
    assert all(set(answers[k]) == {"source", "error", "hint"} for k in (1, 3, 4, 6))
    assert [answer["source"] for answer in answers] == [*(f"stdin:{n}" for n in range(1, 7)), "gone.jsonl"]
    assert failure == {
        "error": "4 of 7 inputs could not be used",
        "hint": "each is named above; the others are answered",
        "code": 1,
    }


def test_for_a_person_bad_inputs_are_one_clear_line_each(made: Path, retex: Retex) -> None:
    Path("mixed.jsonl").write_text('{"text": "a car"}\n{"text": " "}\n{"image": "none.png"}\n{"te\n')
    Path("photo.png").write_bytes(b"x")
    result = retex("identify", "mixed.jsonl", "photo.png", "--quiet")
    assert result.code == 1
    assert len(result.out.splitlines()) == 1
    errors = result.err.splitlines()
    assert [line.startswith("error: ") for line in errors] == [True] * 5 + [False]
    for line, words in zip(
        errors[:5],
        (
            "mixed.jsonl:2: the text is ' ' (remove the row or fill it)",
            "mixed.jsonl:3: no such image: none.png",
            "mixed.jsonl:4: not valid JSON",
            "photo.png: an image, and merged reads texts (give texts)",
            "4 of 5 inputs could not be used",
        ),
        strict=True,
    ):
        assert words in line


def test_a_batch_shares_one_answer_and_loses_only_its_bad_inputs(made: Path, retex: Retex) -> None:
    whole = retex("identify", "--batch", "data/cars-test.jsonl", "--json")
    assert whole.code == 0, whole.err
    (answer,) = whole.lines
    assert (answer["task"], answer["source"]) == ("cars", "48 inputs")
    rows = Path("data/cars-test.jsonl").read_text().splitlines()
    Path("data/cars-test.jsonl").write_text("\n".join(["{", *rows]))
    bad, again, failure = retex("identify", "--batch", "data/cars-test.jsonl", "--json").lines
    assert bad["source"] == "data/cars-test.jsonl:1"
    assert again == answer
    assert failure["code"] == 1
    nothing = retex("identify", "--batch", "gone.jsonl")
    assert (nothing.code, nothing.out) == (1, "")


def test_answers_do_not_depend_on_what_they_are_batched_with(made: Path, retex: Retex) -> None:
    whole = retex("identify", "data/dtd-test.jsonl", "--json", "--batch-size", "7").lines
    for one, row in zip(whole, Path("data/dtd-test.jsonl").read_text().splitlines()[:5], strict=False):
        (alone,) = retex("identify", json.loads(row)["text"], "--json").lines
        assert (alone["task"], alone["unknown"]) == (one["task"], one["unknown"])
        assert alone["probability"] == pytest.approx(one["probability"], abs=2e-2)


def test_the_plan_reads_no_input_and_refuses_other_signatures(made: Path, retex: Retex) -> None:
    result = retex("identify", "-", "--dry-run", "--json")
    assert result.json == {"inputs": ["-"], "encoder": "merged", "tasks": ["cars", "dtd"]}
    assert retex("identify", "-", "-").code == 2
    assert retex("build-signatures", "--merged", "base", "--overwrite").code == 0
    result = retex("identify", "-")
    assert result.code == 1
    assert "signatures.safetensors: built on another encoder" in result.err


def test_as_a_function_bad_inputs_are_beside_the_answers(made: Path) -> None:
    report = retex_cli.identify("merged", "signatures.safetensors", [CAR, "gone.jsonl", CLOTH])
    assert [found.task for found in report.inputs] == ["cars", "dtd"]
    assert [item.source for item in report.bad] == ["gone.jsonl"]
    assert len(report.lines()) == 3


def test_tokenised_inputs_of_any_length_and_only_good_ones(made: Path, retex: Retex) -> None:
    def tokens(*ids: int) -> None:
        save_file({"input_ids": torch.tensor([ids, ids[::-1]])}, f"{len(ids)}.safetensors")

    tokens(2, 5, 9, 3)
    tokens(2, 5, 3)
    save_file({"input_ids": torch.tensor([[2, 5, 9999, 3]])}, "unknown.safetensors")
    save_file({"pixels": torch.zeros(1, 3, 4)}, "pixels.safetensors")
    result = retex("identify", *(f"{name}.safetensors" for name in ("4", "3", "unknown", "pixels")), "--json")
    assert result.code == 1
    *answers, _ = result.lines
    assert ["task" in answer for answer in answers] == [True] * 4 + [False] * 2
    assert "merged cannot take this input (input_ids [4]): IndexError" in answers[4]["error"]
    assert "merged cannot take this input (pixels [3, 4])" in answers[5]["error"]


def test_ready_inputs_look_like_the_reference_inputs_but_for_their_length(made: Path, retex: Retex) -> None:
    draw = torch.Generator().manual_seed(0)
    for task, low, high in (("cars", 4, 20), ("dtd", 20, 40)):
        save_file({"input_ids": torch.randint(low, high, (40, 9), generator=draw)}, f"data/{task}.safetensors")
    given = [word for task in ("cars", "dtd") for word in ("--inputs", f"{task}=data/{task}.safetensors")]
    assert retex("build-signatures", *given, "--overwrite").code == 0
    ids = load_file("data/cars.safetensors")["input_ids"][:2]
    save_file({"input_ids": ids[:, :5].contiguous()}, "short.safetensors")
    save_file({"input_ids": ids, "more": ids + 1}, "more.safetensors")
    save_file({"input_ids": ids.unsqueeze(2).contiguous()}, "deep.safetensors")
    result = retex("identify", *(f"{name}.safetensors" for name in ("short", "more", "deep")), "a text", "--json")
    *answers, _ = result.lines
    assert ["task" in answer for answer in answers] == [True] * 2 + [False] * 4 + [True]
    assert "row 1: has the tensors input_ids, more, the reference inputs have input_ids" in answers[2]["error"]
    assert "row 1: 'input_ids' is [9, 1], the reference inputs have [any]" in answers[4]["error"]


def test_shapes_are_what_reference_inputs_have_in_common() -> None:
    sizes = ((3, 8, 8), (3, 8, 6))
    examples = [Example(tensors={"x": torch.zeros(size), "ids": torch.zeros(5)}) for size in sizes]
    assert shapes_of(examples) == {"x": [3, 8, None], "ids": [None]}
    assert shapes_of([Example(text="a")]) == {}


def test_windows_grow_and_lose_nothing() -> None:
    items = [Example(text=str(n)) for n in range(12_000)]
    found = list(windows(iter(items)))
    assert [item for window in found for item in window] == items
    assert len(found[0]) == FIRST
    assert max(map(len, found)) == LARGEST
