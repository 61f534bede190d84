"""Which arithmetic is the fast one here."""

from __future__ import annotations

import pytest
import torch

from retex_cli.models.device import has_fast_bf16


@pytest.mark.parametrize(
    ("has", "fast"), [({"amx_bf16": True}, True), ({"avx512_bf16": True}, True), ({"avx2": True}, False), ({}, False)]
)
def test_bfloat16_is_fast_where_the_processor_multiplies_it(
    has: dict[str, bool], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert has_fast_bf16(torch.device("cpu")) is fast
