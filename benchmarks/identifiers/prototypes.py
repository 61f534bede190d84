"""The second half of ESM++ (arXiv 2606.19164): residual adapters that every layer chooses for itself, by prototypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from rivals.adapters import shift_directions
from torch import Tensor, nn

from identifiers.form import unit


@dataclass(frozen=True)
class Adapter:
    """Of one layer: ``prototypes`` [T, d_in] of length one, and per task ``down`` [T, r, d_in], ``up`` [T, d_out, r]:
    task t's layer is the merged one with ``up[t] @ down[t]`` added to its weight."""

    prototypes: Tensor
    down: Tensor
    up: Tensor


def adapter(residuals: Sequence[Tensor], grams: Sequence[Tensor], means: Sequence[Tensor], rank: int) -> Adapter:
    """From every task's ``residuals`` [d_out, d_in] (expert minus merged), the Gram matrices [d_in, d_in] of the
    layer's inputs in its expert, and the mean [d_in] of its unit-length input means in the merged model."""
    ups = [shift_directions(part, gram, rank) for part, gram in zip(residuals, grams, strict=True)]
    downs = [up.T @ part for up, part in zip(ups, residuals, strict=True)]
    return Adapter(unit(torch.stack(list(means))), torch.stack(downs), torch.stack(ups))


@dataclass
class Routing:
    """What one forward pass decides: ``chosen`` [n] per layer. ``mask`` [n, positions] says which positions count.

    ``oracle`` [n] are the true tasks, for the switch that takes the routing out of the question.
    """

    mask: Tensor | None = None
    oracle: Tensor | None = None
    chosen: dict[str, Tensor] = field(default_factory=dict)

    def votes(self, tasks: int) -> Tensor:
        """Per input the share of layers that chose each task: [n, tasks]."""
        return torch.stack([nn.functional.one_hot(c, tasks) for c in self.chosen.values()]).float().mean(0)


def input_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over positions of a layer's input [n, positions, d_in] or [n, d_in, height, width]: [n, d_in]."""
    if x.ndim == 4:
        return x.float().mean((2, 3))
    if mask is None:
        return x.float().mean(1)
    weight = mask.float()[..., None]
    return (x.float() * weight).sum(1) / weight.sum(1).clamp(min=1)


@contextmanager
def watched(module: nn.Module, names: Sequence[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While it lasts, ``see(name, input)`` hears of every input of these layers."""
    layers = [(name, module.get_submodule(name)) for name in names]
    hooks = [layer.register_forward_pre_hook(lambda _, given, name=name: see(name, given[0])) for name, layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def routed(module: nn.Module, adapters: Mapping[str, Adapter]) -> Iterator[Routing]:
    """The merged ``module`` with adapters on its linear layers and 1 x 1 convolutions, by layer name.

    Each layer takes, for every input, the task whose prototype has the largest cosine with the input's mean; with
    ``oracle`` set, the true one. Set ``mask`` before each pass, read ``chosen`` after it.
    """
    routing = Routing()
    hooks = [module.get_submodule(name).register_forward_hook(_adapt(name, a, routing)) for name, a in adapters.items()]
    try:
        yield routing
    finally:
        for hook in hooks:
            hook.remove()


def _adapt(name: str, found: Adapter, routing: Routing) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        del layer
        x = given[0]
        chosen = (unit(input_mean(x, routing.mask)) @ found.prototypes.T).argmax(1)
        routing.chosen[name] = chosen
        task = chosen if routing.oracle is None else routing.oracle
        down, up = found.down[task], found.up[task]
        if x.ndim == 4:
            added = up @ (down @ x.float().flatten(2))
            return output + _strided(added.reshape(len(x), -1, *x.shape[2:]), output).to(output.dtype)
        added = (x.float() @ down.transpose(1, 2)) @ up.transpose(1, 2)
        return output + added.to(output.dtype)

    return hook


def _strided(added: Tensor, output: Tensor) -> Tensor:
    """A 1 x 1 convolution may skip positions."""
    step = -(-added.shape[2] // output.shape[2])
    return added[:, :, ::step, ::step]
