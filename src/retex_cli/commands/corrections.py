"""Corrections of lossless tasks in an offsets file: taken out, applied and checked."""

from __future__ import annotations

import torch
from torch import Tensor

from retex_cli.errors import RetexError
from retex_cli.io.checkpoint import Checkpoint
from retex_cli.offsets import lossless
from retex_cli.offsets.coder import CorruptOffsets
from retex_cli.offsets.fixed import Prediction


def stored_name(task: str, name: str) -> str:
    """What the file calls the correction of the expert's tensor ``name``."""
    return f"exact/{task}/{name}"


def restore(file: Checkpoint, path: str, task: str, name: str, prediction: Prediction, dtype: torch.dtype) -> Tensor:
    """The expert's tensor ``name``, [rows, columns] of its prediction; ``path`` is what the user called the file.

    RetexError, with what to do, for a damaged correction and where the result has another SHA-256.
    """
    stored = stored_name(task, name)
    try:
        if stored not in file.tensors:
            raise CorruptOffsets("it is not there")
        return lossless.decode(file.read(stored).numpy().tobytes(), prediction, dtype)
    except CorruptOffsets as error:
        raise RetexError(
            f"{path}: the correction of tensor {name!r} of task {task!r} is damaged: {error}",
            "other tasks can still be recovered; get the file again for this one",
        ) from error
    except lossless.OtherPrediction as error:
        raise RetexError(
            f"{path}: tensor {name!r} of task {task!r} does not come back bit for bit: its SHA-256 is {error}; this "
            "machine predicts other values than the one that fitted the file",
            "recover with the versions of torch and retex that fitted it, or fit it again here",
        ) from error
