"""Corrections of lossless tasks in an offsets file: taken out, applied and checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from retex_cli.commands.blocks import Block
from retex_cli.errors import RetexError
from retex_cli.io.checkpoint import Checkpoint
from retex_cli.offsets import lossless
from retex_cli.offsets.coder import CorruptOffsets
from retex_cli.offsets.fixed import Prediction


def stored_name(task: str, name: str) -> str:
    """What the file calls the correction of the expert's tensor ``name``."""
    return f"exact/{task}/{name}"


@dataclass(frozen=True)
class Exact:
    """Corrections of the tensors of one task. ``path`` is what the user called the file."""

    file: Checkpoint
    path: str
    task: str

    def blocks(self, name: str, rows: int, columns: int, predicted: Prediction, dtype: torch.dtype) -> Iterator[Block]:
        """The expert's tensor ``name``, [rows, columns] (see ``Prediction``), from merged rows; ``predicted`` may hold
        none of them. RetexError, with what to do, for a damaged correction and where the result has another SHA-256.
        """
        with self._in_words(name):
            correction = self._open(name, rows, columns, dtype)

        def restore(index: int, merged: Tensor, out: Tensor | None) -> Tensor:
            del out  # integers are made elsewhere
            with self._in_words(name):
                start = correction.blocks[index][0]
                return correction.restore(index, predicted.over(merged.cpu().reshape(-1, columns), start)).reshape(-1)

        def check(digest: bytes) -> None:
            with self._in_words(name):
                correction.check(digest)

        for index, (start, stop) in enumerate(correction.blocks):
            last = index == len(correction.blocks) - 1
            span = start * columns, stop * columns
            yield Block(span[0], span, partial(restore, index), check if last else None)

    def _open(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> lossless.Correction:
        stored = stored_name(self.task, name)
        if stored not in self.file.tensors:
            raise CorruptOffsets("it is not there")

        def read(start: int, stop: int) -> bytes:
            data = torch.empty(stop - start, dtype=torch.uint8)
            self.file.read_into(stored, start, data)
            return data.numpy().tobytes()

        return lossless.Correction(read, self.file.tensors[stored].nbytes, rows, columns, dtype)

    @contextmanager
    def _in_words(self, name: str) -> Iterator[None]:
        try:
            yield
        except CorruptOffsets as error:
            raise RetexError(
                f"{self.path}: the correction of tensor {name!r} of task {self.task!r} is damaged: {error}",
                "other tasks can still be recovered; get the file again for this one",
            ) from error
        except lossless.OtherPrediction as error:
            raise RetexError(
                f"{self.path}: tensor {name!r} of task {self.task!r} does not come back bit for bit: its SHA-256 is "
                f"{error}; this machine predicts other values than the one that fitted the file",
                "recover with the versions of torch and retex that fitted it, or fit it again here",
            ) from error
