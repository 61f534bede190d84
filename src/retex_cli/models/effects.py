"""How much a network's answers change for an error in each of its tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retex_cli.io.inputs import Example
from retex_cli.models.distil import answer_of
from retex_cli.models.network import Network
from retex_cli.parallel import one_thread_each

BATCH = 8
"""Inputs in one pass."""


def effects(network: Network, examples: Sequence[Example], seed: int = 0) -> dict[str, float]:
    """Parameter name -> mean over its entries of the squared derivative of the answers, summed over ``examples``: what
    a small error in an entry changes, squared.

    The trace of the Gauss-Newton matrix, by one random projection of the answers; of class probabilities that is the
    Fisher information. One backward pass for every ``BATCH`` examples; holds one gradient.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = [(name, value.detach()) for name, value in network.module.named_parameters()]
    found = {name: 0.0 for name, _ in parameters}
    leaves = [value.requires_grad_() for _, value in parameters]
    with torch.enable_grad(), one_thread_each():
        for start in range(0, len(examples), BATCH):
            inputs = network.inputs(examples[start : start + BATCH])
            output = torch.func.functional_call(network.module, dict(zip(found, leaves, strict=True)), (), inputs)
            projected = _projected(answer_of(output).float(), generator)
            gradients = torch.autograd.grad(projected, leaves, allow_unused=True)
            for name, gradient in zip(found, gradients, strict=True):
                found[name] += 0.0 if gradient is None else float(gradient.square().mean())
    return found


def _projected(answers: Tensor, generator: torch.Generator) -> Tensor:
    """A sum whose squared gradient is, in the mean over signs, that of all answers together."""
    signs = (torch.randint(0, 2, answers.shape, generator=generator) * 2.0 - 1).to(answers.device)
    if answers.ndim == 2 and answers.shape[1] > 1:
        logarithms = answers.log_softmax(-1)
        return (signs * logarithms.detach().exp().sqrt() * logarithms).sum()
    spread = (answers.detach().flatten(1) - answers.detach().flatten(1).mean(1, keepdim=True)).square().sum(1)
    return ((signs * answers).flatten(1).sum(1) / spread.clamp_min(1e-12).sqrt()).sum()
