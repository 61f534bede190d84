"""The promises: what counts as worse, and that rows are those of the command line."""

from __future__ import annotations

import math
from pathlib import Path

import promises
import promises_tables
import pytest
from promises import ALONE, MODES, Suite, cached, told, violations

import retex_cli


def entry(budget: str, *distances: float) -> dict[str, object]:
    return {"task": "cars", "mode": "data-free", "budget": budget, "logs": [math.log(each) for each in distances]}


def test_a_row_is_worse_than_the_best_smaller_one() -> None:
    rows = [
        entry("0", 1.0, 1.0, 1.0),
        entry("0.1%", 0.5, 0.6, 0.4),
        {"task": "cars", "mode": "data-free", "budget": "0.2%", "error": "holds nothing"},
        entry("0.5%", 0.51, 0.62, 0.41),
        entry("1%", 0.9, 0.2, 0.8),
        entry("2%", 0.1, 0.1, 0.1),
    ]
    found = list(violations(rows))
    assert [(each["budget"], each["than"], each["clear"]) for each in found] == [
        ("0.5%", "0.1%", True),
        ("1%", "0.1%", False),
    ]
    assert found[0]["by"] == pytest.approx((1.02 * 31 / 30 * 1.025) ** (1 / 3) - 1)
    assert told(rows[5])["distance"] == pytest.approx(0.1)
    assert "logs" not in told(rows[5])


def test_rows_are_measured_once(tmp_path: Path) -> None:
    calls = []

    def measure() -> dict[str, object]:
        calls.append(1)
        return {"near": 0.5}

    for fresh, expected in ((False, 1), (False, 1), (True, 2)):
        assert cached(tmp_path / "a/row.json", measure, fresh) == {"near": 0.5}
        assert len(calls) == expected


def test_a_fit_is_that_of_the_command_line(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    suite = Suite(made, made / "average.safetensors", 12)
    ground = suite.ground("cars")
    assert len(ground.rows) == 12
    assert {row.label for row in ground.rows} == {None}
    report = retex_cli.fit_offsets(
        str(suite.merged_file), {"cars": suite.experts["cars"]}, "again.safetensors", budget="5%", device="cpu"
    )
    alone, free, given = (suite.measure(ground, budget, mode) for budget, mode in ((ALONE, MODES[0]), *_BOTH))
    assert free["bytes"] == report.rows["cars"]["offset_bytes"]
    assert free["kept"] == report.rows["cars"]["kept"]
    assert given["kept"]["inputs"] != free["kept"]["inputs"]
    assert told(free)["distance"] < told(alone)["distance"]
    assert alone["near"] <= free["near"] <= 1
    assert "the least that holds anything" in str(suite.measure(ground, "0.02%", MODES[0])["error"])


_BOTH = (("5%", MODES[0]), ("5%", MODES[1]))


def test_the_page_marks_what_is_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"task": "blur", "mode": "data-free", "budget": budget, "bytes": 9, "near": near, "distance": distance}
        for budget, near, distance in (("0", 20.0, 0.5), ("1%", 19.0, 0.6), ("2%", 30.0, 0.012))
    ]
    rows[2]["kept"] = {"budget_bytes": 9}
    worse = [{"task": "blur", "mode": "data-free", "budget": "1%", "than": "0", "by": 0.2, "clear": True}]
    made = {"commit": "x", "cores": 2, "processor": "y"}
    result = {"rows": rows, "violations": worse, "near": "PSNR, dB", "provenance": made}
    monkeypatch.setattr(promises_tables, "load", lambda name: result if name == "promises-restoration" else None)
    page = promises_tables.promises_page()
    assert "Rows that are clearly worse than a smaller one: 1; inside the noise: 0." in page
    assert "| merged alone | 20.0 dB, 0.500 |" in page
    assert "| 1% | 19.0 dB, 0.600 **worse than 0** |" in page
    assert "| 2% | 30.0 dB, 0.0120 |" in page
    monkeypatch.setattr(promises_tables, "load", lambda name: None)
    assert "Nothing measured yet" in promises_tables.promises_page()
    assert promises.BUDGETS[0] == "0.02%"
