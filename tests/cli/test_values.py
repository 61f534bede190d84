from __future__ import annotations

import pytest

from retex_cli.cli.values import names, pairs, scalar, settings, shares, size
from retex_cli.errors import UsageError


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("5GB", 5_000_000_000),
        ("600MB", 600_000_000),
        ("600 mb", 600_000_000),
        ("1.5k", 1500),
        ("512MiB", 512 * 1024**2),
        ("2GiB", 2 * 1024**3),
        ("1", 1),
        ("17B", 17),
    ],
)
def test_size(text: str, count: int) -> None:
    assert size(text, "--max-memory") == count


@pytest.mark.parametrize("text", ["", "GB", "0", "0.1", "-5GB", "5XB", "5GBs", "five"])
def test_what_is_no_size_names_the_option(text: str) -> None:
    with pytest.raises(UsageError, match="--max-memory"):
        size(text, "--max-memory")


def test_pairs_keep_everything_behind_the_first_sign() -> None:
    assert pairs(["cars=a=b", "dtd=/x"], "--expert") == {"cars": "a=b", "dtd": "/x"}
    assert pairs(None, "--expert") == {}


@pytest.mark.parametrize("item", ["cars", "cars=", "=x", "a b=x", "auto=x"])
def test_what_is_no_pair_is_refused(item: str) -> None:
    with pytest.raises(UsageError, match="--expert"):
        pairs([item], "--expert")


def test_a_task_given_twice_names_both() -> None:
    with pytest.raises(UsageError, match=r"'cars' is given twice, as 'a' and 'b'"):
        pairs(["cars=a", "cars=b"], "--expert")


def test_shares() -> None:
    assert shares("cars=0.7,dtd=0.3", "--mix") == {"cars": 0.7, "dtd": 0.3}
    assert shares(None, "--mix") == {}
    with pytest.raises(UsageError, match="'much' is not a number"):
        shares("cars=much", "--mix")


def test_names() -> None:
    assert names("K, H") == ("K", "H")
    assert names(None) is None


def test_scalar() -> None:
    assert [scalar(text) for text in ("1", "0.5", "true", "False", "auto", "1e-3")] == [
        1,
        0.5,
        True,
        False,
        "auto",
        1e-3,
    ]
    assert type(scalar("1")) is int


def test_settings_split_at_the_last_colon_before_the_sign() -> None:
    assert settings(["density=0.5", "*.bias:density=1", "a:b:k=x:y", "*.bias:top-k=2"], "--set") == (
        {"density": 0.5},
        {"*.bias": {"density": 1, "top_k": 2}, "a:b": {"k": "x:y"}},
    )


@pytest.mark.parametrize("item", ["density", "density=", "*.bias:=1", "=1"])
def test_what_is_no_setting_is_refused(item: str) -> None:
    with pytest.raises(UsageError, match="--set"):
        settings([item], "--set")
