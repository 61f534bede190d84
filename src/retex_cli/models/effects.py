"""How much a network's answers change for an error in each of its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from retex_cli.io.inputs import Example
from retex_cli.models.distil import answer_of
from retex_cli.models.network import Network
from retex_cli.parallel import one_thread_each

BATCH = 8
"""Inputs in one pass."""


def normalises(module: nn.Module) -> bool:
    """Whether any layer brings what it reads to a scale of its own, so that errors before it do not grow."""
    return any("Norm" in type(part).__name__ for part in module.modules())


def effects(network: Network, examples: Sequence[Example], seed: int = 0) -> dict[str, float]:
    """Parameter name -> mean over its entries of the squared derivative of the answers: what a small error in an entry
    changes, squared (the trace of the Gauss-Newton matrix, by one random projection; of class probabilities that is
    the Fisher information). One backward pass; no gradient is held longer than it takes to measure it.
    """
    found: dict[str, float] = {}
    generator = torch.Generator().manual_seed(seed)
    named = dict(network.module.named_parameters())
    before = {name: parameter.requires_grad for name, parameter in named.items()}
    hooks = []
    for name, parameter in named.items():
        parameter.requires_grad_(True)
        hooks.append(parameter.register_post_accumulate_grad_hook(partial(_measure, found, name)))
    try:
        with torch.enable_grad(), one_thread_each():
            for start in range(0, len(examples), BATCH):
                inputs = network.inputs(examples[start : start + BATCH])
                _projected(answer_of(network.module(**inputs)).float(), generator).backward()  # type: ignore[no-untyped-call]
    finally:
        for hook in hooks:
            hook.remove()
        for name, parameter in named.items():
            parameter.requires_grad_(before[name])
    return found


def _measure(found: dict[str, float], name: str, parameter: Tensor) -> None:
    assert parameter.grad is not None, "it was accumulated just now"
    found[name] = found.get(name, 0.0) + float(parameter.grad.square().mean())
    parameter.grad = None


def _projected(answers: Tensor, generator: torch.Generator) -> Tensor:
    """A sum whose squared gradient is, in the mean over signs, that of all answers together."""
    signs = (torch.randint(0, 2, answers.shape, generator=generator) * 2.0 - 1).to(answers.device)
    if answers.ndim == 2 and answers.shape[1] > 1:
        logarithms = answers.log_softmax(-1)
        return (signs * logarithms.detach().exp().sqrt() * logarithms).sum()
    spread = (answers.detach().flatten(1) - answers.detach().flatten(1).mean(1, keepdim=True)).square().sum(1)
    return ((signs * answers).flatten(1).sum(1) / spread.clamp_min(1e-12).sqrt()).sum()
