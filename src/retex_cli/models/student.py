"""A network some of whose tensors are computed, so that gradients reach what they are computed from.

A low-rank offset of a linear layer or an embedding acts on the layer's inputs and is never multiplied out; any other
tensor takes the place of the network's own. The network may then run in several threads at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

Factors = tuple[Tensor, Tensor]


class Student:
    """``module``, in eval mode and filled, as a function of what ``take`` is given. Its own parameters never move."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module.requires_grad_(False)
        self._layers = dict(module.named_modules())
        self._factors: dict[str, Factors] = {}
        self._additive = {f"{name}.weight" for name, layer in self._layers.items() if self._listens(name, layer)}

    def adds(self, name: str) -> bool:
        """Whether the tensor ``name`` takes the two factors of an offset; others take their whole value."""
        return name in self._additive

    def own(self, name: str) -> Tensor:
        """The value that the network was filled with."""
        return self.module.get_parameter(name) if name in self._parameters else self.module.get_buffer(name)

    @property
    def _parameters(self) -> set[str]:
        return {name for name, _ in self.module.named_parameters(remove_duplicate=False)}

    def take(self, values: Mapping[str, Tensor | Factors]) -> None:
        """Compute with these from now on: whole tensors, or (left [m, k], right [k, n]) where ``adds``."""
        for name, value in values.items():
            if isinstance(value, Tensor):
                place, _, attribute = name.rpartition(".")
                layer = self._layers[place]
                layer._parameters.pop(attribute, None)
                layer._buffers.pop(attribute, None)
                setattr(layer, attribute, value)
            else:
                self._factors[name] = value

    def _listens(self, name: str, layer: nn.Module) -> bool:
        """Give a layer the forward pass that computes with what is taken; False where its kind has none."""
        weight = f"{name}.weight"
        if isinstance(layer, _BatchNorm) and layer.track_running_stats:
            layer.__dict__["forward"] = _batchnorm(layer)
            return False
        if type(layer) is nn.Linear:
            layer.__dict__["forward"] = self._linear(layer, weight)
        elif type(layer) is nn.Embedding and layer.max_norm is None:
            layer.__dict__["forward"] = self._embedding(layer, weight)
        else:
            return False
        pointer = layer.weight.data_ptr()  # a tied weight is two layers', and has one offset
        return sum(p.data_ptr() == pointer for _, p in self.module.named_parameters(remove_duplicate=False)) == 1

    def _linear(self, layer: nn.Linear, weight: str) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            y = functional.linear(x, layer.weight, layer.bias)
            if (factors := self._factors.get(weight)) is None:
                return y
            return y + functional.linear(functional.linear(x, factors[1]), factors[0])

        return forward

    def _embedding(self, layer: nn.Embedding, weight: str) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            y = functional.embedding(x, layer.weight, layer.padding_idx)
            if (factors := self._factors.get(weight)) is None:
                return y
            return y + functional.embedding(x, factors[0]) @ factors[1]

        return forward


def _batchnorm(layer: _BatchNorm) -> Callable[[Tensor], Tensor]:
    """As in use, but gradients reach the running statistics, which torch's own does not give."""

    def forward(x: Tensor) -> Tensor:
        assert layer.running_mean is not None, "a layer without running statistics is not patched"
        assert layer.running_var is not None
        scale = torch.rsqrt(layer.running_var + layer.eps)
        scale = scale if layer.weight is None else scale * layer.weight
        shift = -layer.running_mean * scale
        shift = shift if layer.bias is None else shift + layer.bias
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return x * scale.view(shape) + shift.view(shape)

    return forward
