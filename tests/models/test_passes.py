"""Many inputs through a network: in order, stackable batches, and only the inputs lost that it cannot take."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from retex_cli.errors import RetexError
from retex_cli.io.inputs import Example
from retex_cli.models.network import Network
from retex_cli.models.passes import run
from retex_cli.models.processor import Inputs, batches, picture
from retex_cli.progress import Silent

CPU = torch.device("cpu")


class Sum(nn.Module):
    """The sum of each input; sevens and other ranks are too much for it."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if values.ndim != 2:
            raise ValueError("values have one dimension\nand no other")
        if (values == 7).any():
            raise IndexError("index out of range")
        return values.sum(1, keepdim=True)


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Network:
    (tmp_path / "config.json").write_text(json.dumps({}))
    monkeypatch.setattr("retex_cli.models.network._from_function", lambda *_: Sum())
    return Network(tmp_path, CPU, model="any:any", name="sums")


def rows(*values: object) -> list[Example]:
    return [Example(tensors={"values": torch.tensor(v).float()}, source=f"row {i}") for i, v in enumerate(values)]


class Counted(Silent):
    def __init__(self) -> None:
        self.steps = 0

    def advance(self, steps: int = 1) -> None:
        self.steps += steps


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_rows_come_back_in_order_and_only_the_bad_ones_are_missing(network: Network, threads: int) -> None:
    examples = rows([1, 2], [3], [[1, 2]], [4, 7], [5, 6], [8], [9, 9])
    examples.insert(3, Example(text="a word", source="the text"))
    seen: list[tuple[int, ...]] = []

    def forward(inputs: Inputs) -> torch.Tensor:
        seen.append(tuple(inputs["values"].shape))
        return network.module(**inputs)

    counted = Counted()
    found = run(network, examples, forward, 8, threads, counted)
    assert found.kept == [0, 1, 5, 6, 7]
    assert found.values.flatten().tolist() == [3, 3, 11, 8, 18]
    assert counted.steps == len(examples)
    words = {i: error.message for i, error in found.refused.items()}
    assert words[2] == "row 2: sums cannot take this input (values [1, 2]): ValueError: values have one dimension"
    assert words[3] == "the text: a text, and sums reads tensors"
    assert words[4] == "row 3: sums cannot take this input (values [2]): IndexError: index out of range"
    assert {shape[0] for shape in seen} > {1}, "good inputs went together"
    with pytest.raises(RetexError, match=r"^row 2: "):
        found.whole()


def test_nothing_kept_is_nothing_and_not_an_error(network: Network) -> None:
    found = run(network, rows(7), lambda inputs: network.module(**inputs), 8, 1, Silent())
    assert (found.kept, len(found.values)) == ([], 0)


def test_what_is_about_the_network_ends_everything(network: Network) -> None:
    def forward(inputs: Inputs) -> torch.Tensor:
        raise RetexError("no hidden states")

    with pytest.raises(RetexError, match="no hidden states"):
        run(network, rows([1], [2]), forward, 8, 1, Silent())


def test_only_what_can_be_stacked_goes_together_short_texts_first() -> None:
    texts = [Example(text=text) for text in ("three", "a", "bb")]
    assert batches([*texts, *rows([1], [1, 2], [3])], 2) == [[3, 5], [4], [1, 2], [0]]
    assert batches([], 2) == []


def test_a_picture_is_read_or_named(tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(np.full((4, 5), 9, np.uint8)).save(tmp_path / "grey.png")
    found = picture(Example(image=tmp_path / "grey.png"))
    assert (found.shape, found.dtype, found.min()) == ((4, 5, 3), np.uint8, 9)
    assert picture(Example(image=found)) is found
    whole = (tmp_path / "grey.png").read_bytes()
    for name, data in (("no.png", b"none"), ("cut.png", whole[:-20])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(RetexError, match=f"{name}: not a readable image") as caught:
            picture(Example(image=tmp_path / name, source=name))
        assert "\n" not in caught.value.message
