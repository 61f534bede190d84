"""The element types of safetensors headers as torch types, and the names that people type for them."""

from __future__ import annotations

import torch

from retex_cli.errors import UsageError

#: Codes of the safetensors format for every whole-byte element type that torch can hold.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}

CODES: dict[torch.dtype, str] = {dtype: code for code, dtype in DTYPES.items()}

_TYPED = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}


def parse_dtype(text: str) -> torch.dtype:
    """The type that ``--dtype`` names: fp32, fp16 or bf16, also in torch's spelling. UsageError for any other."""
    try:
        return _TYPED[text.strip().lower()]
    except KeyError:
        raise UsageError(f"unknown --dtype {text!r}", "use one of fp32, fp16, bf16") from None


def type_name(dtype: torch.dtype) -> str:
    """``float32`` rather than ``torch.float32``: how reports and messages write a type."""
    return str(dtype).removeprefix("torch.")
