"""The harness: rivals and retex are scored alike, rows are kept, the table says who lies above."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pareto
import pareto_tables
import pytest
import torch
from field import Field, drawn
from pareto import Row
from rivals.table import forms


@pytest.fixture
def field(made: Path) -> Field:
    return Field(made, made / "merged")


def test_an_expert_has_all_of_its_own_accuracy(field: Field) -> None:
    scores = field.scores(lambda task: field.tensors(field.models.experts[task], task))
    assert scores["tasks"] == {"cars": 1.0, "dtd": 1.0}
    assert (scores["mean"], scores["worst"], scores["agreement"]) == (1.0, 1.0, 1.0)
    assert scores["interval"] == [1.0, 1.0], "paired: expert and recovered on the same rows"


def test_a_worse_one_has_less(field: Field) -> None:
    scores = field.scores(lambda _: {name: 0 * tensor for name, tensor in field.tensors(field.merged).items()})
    low, high = scores["interval"]
    assert low < scores["mean"] < high < 1
    assert scores["agreement"] < 1
    assert scores["worst"] == min(scores["tasks"].values())


def test_rows_limit_the_test_rows_and_leave_no_label_out(made: Path) -> None:
    every = Field(made, made / "merged")
    some = Field(made, made / "merged", 12)
    for task, rows in some.tests.items():
        assert len(rows) == 12
        assert {row.label for row in rows} == {row.label for row in every.tests[task]}
    assert some.fingerprint() != every.fingerprint()
    assert every.fingerprint() == Field(made, made / "merged").fingerprint()
    rows = every.tests["cars"]
    assert drawn(rows, 5) == drawn(rows, 5) != rows[:5]
    assert drawn(rows, 1000) == drawn(rows, None) == rows


def test_rivals_are_measured_on_what_their_bytes_say(field: Field) -> None:
    case = field.case()
    found = {f"{form.name} {form.size}": pareto.rival(field, case, form) for form in forms(2) if form.name in RUN}
    for name, entry in found.items():
        assert entry["fraction"] == pytest.approx(entry["bytes_per_task"] / field.expert_bytes), name
        assert 0 < entry["fraction"] < 1, name
        assert 0 < entry["worst"] <= entry["mean"], name
        assert json.dumps(entry)
    assert found["svd r = 16"]["agreement"] == 1
    assert found["esm++ r = 8"]["bytes_per_task"] < found["esm++-everywhere r = 8"]["bytes_per_task"]
    assert found["emr 1 bit"]["shared_bytes"] > 0


RUN = {"svd", "esm++", "esm++-everywhere", "emr", "retex-recreation"}


def test_grams_are_of_the_experts_own_inputs(field: Field) -> None:
    grams = field.case().grams()
    assert set(grams) == {"cars", "dtd"}
    name = next(name for name in grams["cars"] if name.endswith("query.weight"))
    assert name in field.names, "by the merged checkpoint's names"
    width = field.merged.tensors[name].shape[1]
    assert grams["cars"][name].shape == (width, width)
    assert not torch.equal(grams["cars"][name], grams["dtd"][name])


def test_retex_itself_through_its_commands(field: Field, made: Path) -> None:
    entry = pareto.ours(field, made, made / "merged", "20%", [])
    assert 0 < entry["fraction"] <= 0.2
    assert entry["agreement"] > 0.9


@pytest.fixture
def rows() -> Iterator[tuple[list[Row], list[str]]]:
    """Two rows, and the names of those that were really measured."""
    done: list[str] = []

    def row(name: str) -> Row:
        numbers = {"bytes_per_task": 10.0, "fraction": 0.1, "mean": 0.9, "worst": 0.8, "agreement": 0.9}
        return Row(name, "", "sources", lambda: (done.append(name), numbers)[1])

    return [row("svd"), row("emr")], done


def test_a_run_goes_on_where_it_stopped(rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (first, second), done = rows

    def kept(row: Row) -> Path:
        return pareto.place("text4", "fingerprint", row)

    before = pareto.run([first], kept, fresh=False)
    after = pareto.run([first, second], kept, fresh=False)
    assert done == ["svd", "emr"]
    assert after[:1] == before
    pareto.run([first], kept, fresh=True)
    assert done == ["svd", "emr", "svd"]
    assert pareto.place("text4", "others", first) != kept(first)
    assert tmp_path in kept(first).parents


def test_rows_take_the_place_of_their_like() -> None:
    known = [{"form": "svd", "size": "r = 1", "mean": 0.8}, {"form": "emr", "size": "1 bit", "mean": 0.9}]
    new = [{"form": "svd", "size": "r = 1", "mean": 0.7}, {"form": "svd", "size": "r = 2", "mean": 0.9}]
    assert pareto.replaced(known, new) == [new[0], known[1], new[1]]
    assert [pareto.chosen(name, "svd,emr") for name in ("svd", "emr", "e")] == [True, True, False]
    assert pareto.chosen("anything", None)


def test_every_row_has_a_name_of_its_own(field: Field, made: Path) -> None:
    def names(*, rivals: bool) -> list[tuple[str, str]]:
        rows = pareto.all_rows(field, made, made / "merged", "text8", rivals=rivals)
        return [(row.form, row.size) for row in rows]

    found = names(rivals=True)
    assert len(set(found)) == len(found)
    assert {form for form, _ in found} >= {"merged", "retex", "bitdelta", "tall-masks", "ultradelta-style"}
    elsewhere = names(rivals=False)
    assert {form for form, _ in elsewhere} == {"merged", *pareto.OURS}
    assert set(elsewhere) < set(found), "what is compared stands in both"


def entry(form: str, fraction: float, mean: float, width: float = 0.0) -> dict[str, object]:
    return {
        "form": form, "size": "", "bytes_per_task": 1e6 * fraction, "fraction": fraction, "mean": mean, "worst": mean,
        "agreement": mean, "interval": [mean - width, mean + width], "worst_interval": [mean - width, mean + width],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rival", "words"),
    [
        (entry("svd", 0.02, 0.97), ""),
        (entry("svd", 0.02, 0.991), "above retex, inside its interval"),
        (entry("svd", 0.02, 0.999), "**above retex**"),
        (entry("svd", 0.005, 0.999), "smaller than any of ours"),
        (entry("merged", 0.0, 0.8), ""),
        (entry("retex-refine", 0.02, 1.0), ""),
    ],
)
def test_who_lies_above(rival: dict[str, object], words: str) -> None:
    ours = [entry("retex", 0.01, 0.98), entry("retex", 0.015, 0.99, 0.002), entry("retex", 0.03, 1.0)]
    assert pareto_tables.above(rival, [*ours, rival]) == words


def test_table_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [entry("merged", 0.0, 0.8), entry("retex", 0.01, 0.98), entry("svd", 0.02, 0.99), entry("svd", 0.01, 0.9)]
    made = {"commit": "c" * 40, "cores": 2, "processor": "p"}
    monkeypatch.setattr(pareto_tables, "load", lambda _: {"text4": entries, "provenance": made})
    lines = [line for line in pareto_tables.pareto_tables().splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0].strip("| ") for line in lines] == ["form", "merged", "**retex**", "svd", "svd"]
    assert "**above retex**" in lines[-1]
    monkeypatch.setattr(pareto_tables, "DOCS", tmp_path)
    path = pareto_tables.plot("text4 on ties", entries)
    first = path.read_bytes()
    assert path.name == "pareto-text4-on-ties.svg"
    assert b"<svg" in first
    pareto_tables.plot("text4 on ties", entries)
    assert path.read_bytes() == first
    monkeypatch.setattr(pareto_tables, "load", lambda _: None)
    assert "Nothing measured yet" in pareto_tables.pareto_tables()
    assert pareto_tables.ours_table() == ""


def test_the_readme_has_ours_and_what_others_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "text4": [entry("retex", 0.01, 0.98), entry("svd", 0.015, 0.9), entry("svd", 0.03, 0.99)],
        "text4 on ties": [
            entry("retex-refine", 0.02, 0.98),
            entry("retex-refine", 0.01, 0.97),
            entry("retex", 0.01, 0.9),
        ],
        "text4-seed1": [entry("retex-refine", 0.01, 0.96)],
        "provenance": {"commit": "c" * 40, "cores": 2, "processor": "p"},
    }
    monkeypatch.setattr(pareto_tables, "load", lambda _: found)
    text = pareto_tables.ours_table()
    assert "docs/pareto-text4.svg" in text
    assert "ties.svg" not in text, "nobody else is in it"
    line, *elsewhere = [line for line in text.splitlines() if line.startswith("| text4")]
    assert "data-free" in line
    assert "90.00 (svd, 1.5 %)" in line
    assert ["97.00" in elsewhere[0], "98.00" in elsewhere[1]] == [True, True], "small ones first"
    assert all(other.startswith("| text4 on ties | `--refine`") for other in elsewhere), "refined rows alone"
    assert len(elsewhere) == 2


def test_tables_name_the_commits_of_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "text4": [
            entry("retex", 0.01, 0.98) | {"commit": "a" * 40},
            entry("retex", 0.02, 0.99) | {"commit": "b" * 40},
            entry("svd", 0.03, 0.9) | {"commit": "d" * 40},
        ],
        "provenance": {"commit": "c" * 40, "cores": 2, "processor": "p"},
    }
    monkeypatch.setattr(pareto_tables, "load", lambda _: found)
    assert "commits `aaaaaaaaaa`, `bbbbbbbbbb`, 2 cores" in pareto_tables.ours_table()
    assert "`bbbbbbbbbb`, `dddddddddd`, 2 cores" in pareto_tables.pareto_tables()


def test_other_merges_and_seeds_stand_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "text4": [entry("retex", 0.01, 0.98), entry("retex-refine", 0.01, 0.99), entry("svd", 0.03, 0.99)],
        "text4 on ties": [entry("retex-refine", 0.01, 0.97)],
        "text4-seed1": [entry("retex", 0.01, 0.96)],
        "text8": [entry("retex", 0.01, 0.5)],
        "provenance": {"commit": "c" * 40, "cores": 2, "processor": "p"},
    }
    monkeypatch.setattr(pareto_tables, "load", lambda _: found)
    lines = pareto_tables.pareto_tables().split("### text4: other merges")[1].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    assert rows[0][2:] == ["plain average, seed 0", "on ties", "seed1", "over seeds"]
    assert [row[0] for row in rows[2:]] == ["**retex**", "**retex-refine**"]
    assert [cell.split()[0] for cell in rows[2][2:-1]] == ["98.00", "-", "96.00"]
    assert rows[2][-1].startswith("97.00 ± 1.41, ")
    assert rows[2][-1].endswith(" (2)")
    assert [cell.split()[0] for cell in rows[3][2:]] == ["99.00", "97.00", "-", "-"]
