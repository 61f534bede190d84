"""What the C library does with freed memory. Imports nothing of ours."""

from __future__ import annotations

import ctypes
import sys

LARGE = 1 << 22
"""Bytes from which on freed memory goes back to the system at once."""
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1


def give_back_large(large: int = LARGE) -> None:
    """Have glibc return every block of ``large`` bytes when it is freed, and keep others; the rest do so anyway.

    Left alone it raises its bound with every large block that is freed, up to 32 MB, and from then on keeps what
    spectral decompositions freed in one heap per thread: two to three times what is in use.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, large)
            mallopt(_M_TRIM_THRESHOLD, 4 * large)
