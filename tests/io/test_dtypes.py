from __future__ import annotations

import pytest
import torch

from retex_cli.errors import UsageError
from retex_cli.io.dtypes import CODES, DTYPES, parse_dtype, type_name


@pytest.mark.parametrize(
    ("text", "dtype"),
    [("fp32", torch.float32), ("float16", torch.float16), ("BF16", torch.bfloat16), (" bfloat16 ", torch.bfloat16)],
)
def test_types_as_people_write_them(text: str, dtype: torch.dtype) -> None:
    assert parse_dtype(text) == dtype


@pytest.mark.parametrize("text", ["", "int8", "fp8", "f32 "])
def test_other_types_cannot_be_written(text: str) -> None:
    with pytest.raises(UsageError, match="unknown --dtype"):
        parse_dtype(text)


def test_codes_are_one_to_one() -> None:
    assert len(CODES) == len(DTYPES)
    assert type_name(torch.bfloat16) == "bfloat16"
