"""The table: what it accepts, what it refuses, and that it loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

from retex_cli.errors import UsageError
from retex_cli.merging.table import METHODS, find_method, options_for


def test_reading_the_table_imports_no_numerical_library() -> None:
    code = "import sys, retex_cli.merging.table; sys.exit(bool({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", METHODS)
def test_every_row_leads_to_a_function_and_a_paper(name: str) -> None:
    method = METHODS[name]
    function = method.function()
    assert callable(function)
    assert method.paper in (function.__doc__ or ""), "the docstring cites the paper of the row"
    assert method.link.startswith("https://")
    assert len({option.name for option in method.options}) == len(method.options)
    for option in method.options:
        assert option.parse(option.default, name) == option.default


def test_an_unknown_method_is_answered_with_the_closest_names() -> None:
    with pytest.raises(UsageError) as caught:
        find_method("tie")
    assert "'tie'" in caught.value.message
    assert "ties" in str(caught.value.hint)


def test_an_unknown_option_is_answered_with_the_closest_names() -> None:
    with pytest.raises(UsageError, match="has no option 'densty'") as caught:
        METHODS["ties"].resolve({"densty": 0.3})
    assert "density" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("option", "value"), [("density", 1.5), ("density", "much"), ("density", True), ("alpha", "nan"), ("scope", "row")]
)
def test_a_value_that_cannot_be_meant_is_refused(option: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"option '{option}' of method 'ties'"):
        METHODS["ties"].resolve({option: value})


def test_forgotten_options_get_the_papers_defaults_and_text_becomes_numbers() -> None:
    resolved = METHODS["pcb"].resolve({"density": "0.3"})
    assert resolved == {"density": 0.3, "alpha": 1.0}


def test_overrides_apply_by_glob_in_the_order_given() -> None:
    overrides = {"*.attention.*": {"density": 0.5, "alpha": 2}, "*.bias": {"density": 1}}
    find = METHODS["pcb"]
    assert options_for(find, "layer.0.attention.q.bias", {}, overrides) == {"density": 1.0, "alpha": 2.0}
    assert options_for(find, "layer.0.mlp.weight", {"alpha": 3}, overrides)["alpha"] == 3.0
