"""Where arithmetic happens and how precisely."""

from __future__ import annotations

import torch

from retex_cli.errors import UsageError
from retex_cli.progress import Progress

DEVICES = ("auto", "cpu", "cuda")


def choose_device(name: str, progress: Progress) -> torch.device:
    """``auto`` is CUDA where there is one; a fallback to the CPU is said. UsageError for anything unknown."""
    if name not in DEVICES:
        raise UsageError(f"unknown device {name!r}", f"one of {', '.join(DEVICES)}")
    if name == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if name == "cuda":
        progress.note("no CUDA device here: computing on the CPU")
    return torch.device("cpu")


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products are faster than float32 ones on this device."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
