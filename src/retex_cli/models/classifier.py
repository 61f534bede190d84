"""A network that answers with one label per input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retex_cli.errors import RetexError
from retex_cli.io.inputs import Example
from retex_cli.models.device import inference
from retex_cli.models.network import Network
from retex_cli.models.processor import batches
from retex_cli.parallel import ordered_map
from retex_cli.progress import Progress


def classify(
    network: Network, examples: Sequence[Example], batch_size: int, threads: int, progress: Progress
) -> Tensor:
    """Float32 [n, classes] on the CPU, in the order of ``examples``. Advances progress by one an example.

    RetexError where the network has not one logit per label of its ``config.json``.
    """
    result = torch.empty(len(examples), len(network.labels))

    def forward(batch: list[int]) -> Tensor:
        inputs = network.inputs([examples[i] for i in batch])
        with inference(network.device):
            logits = network.logits(inputs).cpu()
        if logits.shape[1] != len(network.labels):
            raise RetexError(
                f"{network.name}: config.json names {len(network.labels)} labels, "
                f"the network gives {logits.shape[1]} logits",
                "name every class under id2label",
            )
        return logits

    plan = batches(examples, batch_size)
    for batch, logits in zip(plan, ordered_map(forward, plan, threads), strict=True):
        result[batch] = logits
        progress.advance(len(batch))
    return result
