import pytest

from retex_cli.commands.budget import budget_bytes
from retex_cli.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.25%", 10_000),
        ("100 %", 4_000_000),
        ("0.1bpp", 12_500),
        ("0.1 bits", 12_500),
        ("80KB", 80_000),
        ("1.5MiB", 1_572_864),
        ("4000", 4000),
    ],
)
def test_ways_to_write_a_budget_for_a_million_parameters(text: str, expected: int) -> None:
    assert budget_bytes(text, 1_000_000) == expected


@pytest.mark.parametrize("text", ["", "a lot", "-3%", "5 apples", "0%", "1e-9%"])
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="budget") as caught:
        budget_bytes(text, 1_000_000)
    assert "%" in (caught.value.hint or "")
