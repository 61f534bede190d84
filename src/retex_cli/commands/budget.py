"""What a person may write as a byte budget: ``0.25%``, ``80KB``, ``1MB``, ``4000``, ``0.1bpp``."""

from __future__ import annotations

import re

from retex_cli.errors import UsageError

_UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 1024, "mib": 1024**2, "gib": 1024**3}
_PATTERN = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*(%|bpp|bits?|[a-z]*)\s*", re.IGNORECASE)


def budget_bytes(text: str, numel: int) -> int:
    """Bytes for one task over ``numel`` shared parameters.

    A percentage is of their fp32 bytes, whatever they are stored as; ``bpp`` is bits per parameter. UsageError for
    anything that is none of these, and for nothing at all.
    """
    match = _PATTERN.fullmatch(text)
    if not match:
        raise UsageError(f"cannot read the budget {text!r}", "write 0.25%, 80KB, 1MB or 0.1bpp")
    number, unit = float(match[1]), match[2].lower()
    if unit == "%":
        size = number / 100 * 4 * numel
    elif unit in ("bpp", "bit", "bits"):
        size = number * numel / 8
    elif unit in _UNITS:
        size = number * _UNITS[unit]
    else:
        raise UsageError(f"unknown unit {match[2]!r} in the budget {text!r}", "write 0.25%, 80KB, 1MB or 0.1bpp")
    if size < 1:
        raise UsageError(f"the budget {text!r} is no byte at all for {numel:,} parameters", "give more, e.g. 0.25%")
    return int(size)
