"""Which task is hurt when an offsets file is damaged: digests of every task's record and of its own tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from torch import Tensor

from retex_cli.errors import RetexError
from retex_cli.io.dtypes import type_name
from retex_cli.io.provenance import tensor_digest

KEY = "checks"
"""The header entry: JSON, task or tensor of the file -> digest. Older files have none, and are not checked by it."""
_LENGTH = 16


def of_record(entry: Mapping[str, object]) -> str:
    """Of a task's entry in the header; twins in JSON have the same."""
    text = json.dumps(entry, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:_LENGTH]


def of_tensor(tensor: Tensor) -> str:
    """Of element type, shape and data."""
    kind = f"{type_name(tensor.dtype)}{list(tensor.shape)}".encode()
    return hashlib.sha256(kind + tensor_digest(tensor.contiguous())).hexdigest()[:_LENGTH]


def damaged(path: str, task: str, why: object) -> RetexError:
    """One task of the file cannot be believed."""
    return RetexError(
        f"{path}: task {task!r} is damaged: {why}",
        "other tasks can still be recovered; get the file again for this one",
    )
