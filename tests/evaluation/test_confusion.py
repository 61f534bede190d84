"""Who is taken for whom: counts by hand, and a picture that says the same."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import numpy as np

from retex_cli.evaluation.confusion import Confusion
from retex_cli.evaluation.protocols import TaskAnswers


def one(task: str, identified: str, unknown: str) -> TaskAnswers:
    found = np.array(identified.split(), dtype=object)
    nothing = np.array([""] * len(found), dtype=object)
    return TaskAnswers(task, nothing, nothing, nothing, {}, found, np.array([c == "?" for c in unknown]))


def test_counts_by_hand() -> None:
    found = Confusion.of([one("a", "a a b a", "..?."), one("b", "b c b", "???")], ["a", "b", "c"])
    assert found is not None
    assert found.counts == {"a": {"a": 3, "b": 1, "c": 0}, "b": {"a": 0, "b": 2, "c": 1}}
    assert found.known == {"a": {"a": 3, "b": 0, "c": 0}, "b": {"a": 0, "b": 0, "c": 0}}
    assert found.unknown == {"a": 1, "b": 3}
    assert found.rows() == [("a", "3", "1", "-", "1"), ("b", "-", "2", "1", "3")]


def test_nothing_identified_is_no_confusion() -> None:
    nothing = np.array([""], dtype=object)
    assert Confusion.of([TaskAnswers("a", nothing, nothing, nothing, {}, None, None)], []) is None


def test_the_picture_names_every_task_and_count() -> None:
    found = Confusion.of([one("a<1>", "a<1> a<1> b a<1>", "...?"), one("b", "b b", "..")], ["a<1>", "b"])
    assert found is not None
    root = ElementTree.fromstring(found.svg())
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[:3] == ["a<1>", "b", "unknown"]
    assert texts[3:7] == ["a<1>", "50.0", "25.0", "25.0"]
    assert texts[7:9] == ["b", "100.0"]
    titles = [element.text for element in root.iter("{http://www.w3.org/2000/svg}title")]
    assert titles[0] == "a<1> as a<1>: 2 inputs"
    assert len(titles) == 6
    assert found.svg() == found.svg()
