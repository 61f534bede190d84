"""Many inputs through a network: batches of like length side by side, and an input it cannot take lost by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retex_cli.errors import RetexError
from retex_cli.io.inputs import Example
from retex_cli.models.network import Network
from retex_cli.models.processor import Inputs, batches
from retex_cli.parallel import ordered_map
from retex_cli.progress import Progress

Outcome = tuple[list[int], Tensor | RetexError]
"""Numbers of some inputs, and a row for each of them or why they have none."""

CANNOT = (RuntimeError, ValueError, IndexError, KeyError, TypeError)
"""What a network raises for inputs of a wrong shape, type or name, and for tokens that it does not know."""


@dataclass(frozen=True)
class Passed:
    """``values`` [k, …] of the inputs number ``kept``, in order; ``refused``: why the others have none."""

    values: Tensor
    kept: list[int]
    refused: Mapping[int, RetexError]

    def whole(self) -> Tensor:
        """The values, where every input has one. RetexError is the first one's that has none."""
        if self.refused:
            raise self.refused[min(self.refused)]
        return self.values


def run(
    network: Network,
    examples: Sequence[Example],
    forward: Callable[[Inputs], Tensor],
    batch_size: int,
    threads: int,
    progress: Progress,
) -> Passed:
    """``forward`` of every example, which gives a CPU tensor with a row per input of its batch.

    A batch that fails is halved until the inputs stand alone that the network cannot take. A RetexError of ``forward``
    is about the network, and goes through. ``threads`` batches run side by side, each on one thread, which gives the
    same bits for any number of them; 0 runs one after another on torch's own threads. One step of progress an example.
    """
    plan = batches(examples, batch_size)

    def attempt(batch: list[int]) -> list[Outcome]:
        return list(_halved(network, examples, forward, batch))

    done = ordered_map(attempt, plan, threads) if threads else map(attempt, plan)
    rows: dict[int, Tensor] = {}
    refused: dict[int, RetexError] = {}
    for outcomes in done:
        for batch, found in outcomes:
            if isinstance(found, RetexError):
                refused.update(dict.fromkeys(batch, found))
            else:
                rows.update(zip(batch, found, strict=True))
            progress.advance(len(batch))
    kept = sorted(rows)
    return Passed(torch.stack([rows[i] for i in kept]) if kept else torch.empty(0), kept, refused)


def _halved(
    network: Network, examples: Sequence[Example], forward: Callable[[Inputs], Tensor], batch: list[int]
) -> Iterator[Outcome]:
    try:
        inputs = network.inputs([examples[i] for i in batch])
    except (RetexError, *CANNOT) as error:
        failure: Exception = error
    else:
        try:
            yield batch, forward(inputs)
            return
        except torch.OutOfMemoryError:
            raise
        except CANNOT as error:
            failure = error
    if len(batch) == 1:
        yield batch, _cannot_take(network, examples[batch[0]], failure)
        return
    middle = len(batch) // 2
    for half in (batch[:middle], batch[middle:]):
        yield from _halved(network, examples, forward, half)


def _cannot_take(network: Network, example: Example, failure: Exception) -> RetexError:
    if isinstance(failure, RetexError):
        return failure
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in (example.tensors or {}).items())
    what = f" ({shapes})" if shapes else ""
    reason = str(failure).strip().splitlines()
    words = f"{type(failure).__name__}: {reason[0] if reason else 'without a word'}"
    error = RetexError(
        f"{example.source}: {network.name} cannot take this input{what}: {words}",
        "give inputs like those the model was trained on",
    )
    error.__cause__ = failure
    return error
