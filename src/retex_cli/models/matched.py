"""Inputs that nobody gave, moved until BatchNorm layers see in them what they saw in training.

A network's running statistics are all that is left of its training data in a checkpoint. Random images have others, so
what a network answers to them says little of what it answers in use; images moved until their statistics are those that
the layers keep tell fits apart nearly as the task's own do (the feature regulariser of DeepInversion, arXiv 1912.08795;
the terms that make images look real are left out, as nobody looks at these).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from retex_cli.io.inputs import Example
from retex_cli.models.batchnorm import batchnorm_layers
from retex_cli.models.distil import answer_of
from retex_cli.models.network import Network
from retex_cli.models.passes import CANNOT
from retex_cli.parallel import ordered_map
from retex_cli.progress import Progress

GROUP = 16
"""Inputs whose statistics are matched together."""
STEPS = 40
RATE = 0.1
"""Of a step, in standard deviations of an input's entries."""
SAME = 1e-3
"""The most that answers may change, as a share of the largest, where bytes are given as floating numbers."""


def matched(network: Network, examples: Sequence[Example], threads: int, progress: Progress) -> tuple[Example, ...]:
    """``examples`` moved, by the statistics that ``network`` is filled with; none where it keeps none, or where what it
    reads is no tensor that can be moved. Entries stay in the range that those of a group have.

    The same bits for any number of threads. Advances by ``STEPS`` for every ``GROUP``.
    """
    layers = list(batchnorm_layers(network.module).values())
    start = _start(network, examples) if layers else None
    if start is None:
        return ()
    name, values = start
    seen = _Seen(layers)
    try:
        groups = [values[first : first + GROUP] for first in range(0, len(values), GROUP)]
        parts = ordered_map(lambda x: _moved(network, name, x, seen, progress), groups, threads)
        moved = torch.cat(list(parts)).cpu()
    except CANNOT:  # no gradient reaches its inputs
        return ()
    finally:
        seen.remove()
    if not bool(moved.isfinite().all()):
        return ()
    return tuple(
        replace(example, image=None, tensors={name: row}) for example, row in zip(examples, moved, strict=True)
    )


def _start(network: Network, examples: Sequence[Example]) -> tuple[str, Tensor] | None:
    """The one tensor that the network reads, float32, if it takes it as that."""
    inputs = network.inputs(examples)
    if len(inputs) != 1:
        return None
    [(name, value)] = inputs.items()
    if not (value.is_floating_point() or value.dtype == torch.uint8):
        return None
    try:
        with network.inference():
            given, moving = (answer_of(network.module(**{name: each[:1]})) for each in (value, value.float()))
    except CANNOT:
        return None
    same = float((given - moving).abs().max()) <= SAME * float(given.abs().max())
    return (name, value.float()) if same else None


def _moved(network: Network, name: str, start: Tensor, seen: _Seen, progress: Progress) -> Tensor:
    low, high, scale = float(start.min()), float(start.max()), float(start.std())
    with torch.enable_grad():
        moving = start.clone().requires_grad_()
        optimiser = torch.optim.Adam([moving], RATE * max(scale, 1e-6))
        for _ in range(STEPS):
            seen.start()
            network.module(**{name: moving})
            [moving.grad] = torch.autograd.grad(seen.distance(), [moving])
            optimiser.step()
            with torch.no_grad():
                moving.clamp_(low, high)
            progress.advance()
    return moving.detach()


class _Seen:
    """What BatchNorm layers are given, each thread's by itself."""

    def __init__(self, layers: Sequence[_BatchNorm]) -> None:
        self._run = threading.local()
        self._hooks = [layer.register_forward_pre_hook(self._keep) for layer in layers]

    def _keep(self, layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if (given := getattr(self._run, "given", None)) is not None:
            given.append((layer, arguments[0]))

    def start(self) -> None:
        """Forget what was given to this thread's last pass."""
        self._run.given = []

    def distance(self) -> Tensor:
        """Squared differences of means by the variance, and of variances' logarithms; mean over channels and layers."""
        return torch.stack([_apart(layer, given) for layer, given in self._run.given]).mean()

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _apart(layer: _BatchNorm, given: Tensor) -> Tensor:
    assert layer.running_mean is not None, "a layer without running statistics is not watched"
    assert layer.running_var is not None
    others = [i for i in range(given.ndim) if i != 1]
    mean, variance = given.mean(others), given.var(others, unbiased=False)
    kept = layer.running_var + layer.eps
    means = (mean - layer.running_mean).square() / kept
    return (means + ((variance + layer.eps).log() - kept.log()).square()).mean()
