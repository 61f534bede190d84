"""Features of every layer of an encoder, for identification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from retex_cli.errors import RetexError
from retex_cli.io.inputs import Example
from retex_cli.models.classifier import build_model, load_weights
from retex_cli.models.device import inference
from retex_cli.models.processor import Processor, batches
from retex_cli.parallel import ordered_map
from retex_cli.progress import Progress


class Encoder:
    """A model in ``folder`` with the weights ``tensors``, read for its hidden states."""

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, Tensor],
        device: torch.device,
        threads: int,
        *,
        max_length: int | None = None,
    ) -> None:
        self._model = build_model(folder)
        load_weights(self._model, tensors, str(folder))
        self._model.to(device)
        self._device = device
        self._threads = threads
        self._folder = folder
        self._processor = Processor(folder, max_length=max_length)

    @property
    def max_length(self) -> int | None:
        """Tokens per text that the features look at."""
        return self._processor.max_length

    def features(self, examples: Sequence[Example], batch_size: int, progress: Progress) -> Tensor:
        """Hidden states of the embedding and of every layer, averaged over positions: float32 [n, layers + 1, width].

        Padding does not count. RetexError where the model gives no hidden states of one width.
        """
        plan = batches(examples, batch_size)

        def forward(batch: list[int]) -> Tensor:
            return self._pooled([examples[i] for i in batch])

        parts = []
        for batch, part in zip(plan, ordered_map(forward, plan, self._threads), strict=True):
            parts.append(part)
            progress.advance(len(batch))
        order = torch.tensor([index for batch in plan for index in batch])
        return torch.cat(parts)[order.argsort()]

    def _pooled(self, examples: Sequence[Example]) -> Tensor:
        inputs = {name: value.to(self._device) for name, value in self._processor(examples).items()}
        with inference(self._device):
            states = self._model(**inputs, output_hidden_states=True).hidden_states
        if states is None or len({state.shape[-1] for state in states}) != 1:
            raise RetexError(f"{self._folder}: the model gives no hidden states of one width to take signatures of")
        mask = inputs.get("attention_mask")
        return torch.stack([_mean(state.float(), mask) for state in states], 1).cpu()


def _mean(state: Tensor, mask: Tensor | None) -> Tensor:
    """[n, positions, width] -> [n, width]; ``mask`` [n, positions] is 1 where a position counts."""
    if mask is None or mask.shape != state.shape[:2]:
        return state.mean(1)
    weight = mask.unsqueeze(-1).float()
    return (state * weight).sum(1) / weight.sum(1).clamp_min(1)
