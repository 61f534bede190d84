"""What is merged or copied, cut into pieces that a worker makes in one go, on the CPU or through a GPU."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from retex_cli.errors import RetexError
from retex_cli.merging.budget import GROUP_ELEMENTS
from retex_cli.merging.options import Value
from retex_cli.merging.view import Kernel, Source, View, check_finite


@dataclass(frozen=True)
class Merge:
    """A tensor to merge by ``method`` with ``options``, written as ``dtype``."""

    view: View
    options: Mapping[str, Value]
    dtype: torch.dtype


@dataclass(frozen=True)
class Copy:
    """A tensor to copy from one source, written as ``dtype``."""

    source: Source
    numel: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Piece:
    """A run of blocks of one tensor: elements ``start .. stop``, written as ``nbytes`` bytes."""

    start: int
    stop: int
    nbytes: int
    work: Callable[[int, int], Tensor]

    def __call__(self) -> Tensor:
        return self.work(self.start, self.stop)


def pieces(step: Merge | Copy, kernel: Kernel | None) -> Iterator[Piece]:
    """One tensor, in order; a kernel of None: there is nothing to compute."""
    if isinstance(step, Copy):
        yield from _cut(step.numel, GROUP_ELEMENTS, step.dtype, lambda start, stop: _copy(step, start, stop))
    elif kernel is not None:
        length, chosen = step.view.block_length(kernel.unit), kernel
        group = -(-GROUP_ELEMENTS // length) * length
        work = _merge if step.view.device.type == "cpu" else _merge_on_device
        yield from _cut(
            step.view.numel, group, step.dtype, lambda start, stop: _checked(step, work(step, chosen, start, stop))
        )


def _cut(numel: int, length: int, dtype: torch.dtype, work: Callable[[int, int], Tensor]) -> Iterator[Piece]:
    for start in range(0, numel, length):
        stop = min(start + length, numel)
        yield Piece(start, stop, (stop - start) * dtype.itemsize, work)


def _copy(step: Copy, start: int, stop: int) -> Tensor:
    out = torch.empty(stop - start, dtype=step.dtype)
    step.source.read_into(start, out)
    if out.is_floating_point():
        check_finite(out, step.source.where, start)
    return out


def _merge(step: Merge, kernel: Kernel, start: int, stop: int) -> Tensor:
    """Elements ``start .. stop`` of the merged tensor, in the output dtype."""
    out = torch.empty(stop - start, dtype=step.dtype)
    for at, base, experts in step.view.blocks(kernel.unit, start, stop, base_only=kernel.base_only):
        out[at - start : at - start + base.numel()] = kernel.merge(base, experts, at)
    return out


def _checked(step: Merge, out: Tensor) -> Tensor:
    if not math.isfinite(out.sum(dtype=torch.float32).item()) and not bool(torch.isfinite(out).all()):
        raise RetexError(
            f"tensor {step.view.name!r} does not fit {str(step.dtype).removeprefix('torch.')} once merged",
            "write a wider type, for instance with --dtype float32, or lower alpha",
        )
    return out


class _Lane(threading.local):
    """A worker's own queue on the GPU: while its block is copied or computed, the others read theirs."""

    def __init__(self) -> None:
        self.stream: torch.cuda.Stream | None = None

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Everything inside goes to this thread's queue, and is done at the end."""
        if self.stream is None:
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self.stream):
            yield
            self.stream.synchronize()


_lane = _Lane()


def on_device(device: torch.device) -> AbstractContextManager[None]:
    """Where a worker's computations run; on a GPU they are done when the block ends, so any other may use them."""
    return nullcontext() if device.type == "cpu" else _lane.on(device)


def _merge_on_device(step: Merge, kernel: Kernel, start: int, stop: int) -> Tensor:
    """The same through a GPU. The view's blocks lie in page-locked memory, so copies run by themselves.

    Each block is finished before its memory is read into again; what overlaps is the work of different workers.
    """
    device = step.view.device
    out = torch.empty(stop - start, dtype=step.dtype, pin_memory=True)
    for at, base, experts in step.view.blocks(kernel.unit, start, stop, base_only=kernel.base_only):
        with _lane.on(device):
            merged = kernel.merge(base.to(device, non_blocking=True), experts.to(device, non_blocking=True), at)
            out[at - start : at - start + base.numel()].copy_(merged.to(step.dtype), non_blocking=True)
    return out
