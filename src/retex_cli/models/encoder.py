"""Features of every layer of a network, for identification."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from retex_cli.errors import RetexError
from retex_cli.io.inputs import Example
from retex_cli.models.network import Network
from retex_cli.models.passes import Passed, run
from retex_cli.models.processor import Inputs
from retex_cli.progress import Progress

LISTS = (torch.nn.ModuleList, torch.nn.Sequential)


class Encoder:
    """A network read for its layers.

    transformers gives its hidden states. Any other network is watched at the submodules that its attribute
    ``feature_layers`` names, or else at the children of its longest ModuleList or Sequential.
    """

    def __init__(self, network: Network, threads: int) -> None:
        self.network = network
        self._threads = threads
        self._watched = None if network.gives_hidden_states else _Watched(network)

    @property
    def max_length(self) -> int | None:
        """Tokens per text that the features look at."""
        return self.network.max_length

    def features(self, examples: Sequence[Example], batch_size: int, progress: Progress) -> Tensor:
        """Every layer's output averaged over positions or pixels: float32 [n, layers, width], the embedding first
        where transformers gives it.

        Padding does not count. Layers narrower than the widest are filled with zeros. RetexError where there are none,
        and for the first input that the network cannot take.
        """
        return self.read(examples, batch_size, progress).whole()

    def read(self, examples: Sequence[Example], batch_size: int, progress: Progress) -> Passed:
        """``features`` of the inputs that the network can take."""

        def forward(inputs: Inputs) -> Tensor:
            with self.network.inference():
                layers = self._hidden_states(inputs) if self._watched is None else self._watched.layers(inputs)
            return _stack(layers).cpu()

        return run(self.network, examples, forward, batch_size, self._threads, progress)

    def _hidden_states(self, inputs: Inputs) -> list[Tensor]:
        states = getattr(self.network.module(**inputs, output_hidden_states=True), "hidden_states", None)
        if states is None:
            raise RetexError(f"{self.network.name}: the model gives no hidden states to take signatures of")
        return [pool(state, inputs.get("attention_mask")) for state in states]


class _Watched:
    """Pooled outputs of chosen submodules. Threads may run the network at once: each keeps its own."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._run = threading.local()
        self._names = feature_layers(network.module)
        if not self._names:
            raise RetexError(
                f"{network.name}: {type(network.module).__name__} has no ModuleList or Sequential to take layers of",
                "name submodules in the attribute `feature_layers` of the network",
            )
        for name in self._names:
            network.module.get_submodule(name).register_forward_hook(self._hook(name))

    def layers(self, inputs: Inputs) -> list[Tensor]:
        """float32 [n, width of the layer] of every layer in one pass. RetexError names a layer that did not run."""
        pooled: dict[str, Tensor] = {}
        self._run.mask, self._run.pooled = inputs.get("attention_mask"), pooled
        self._network.module(**inputs)
        self._run.pooled = None
        lost = [name for name in self._names if name not in pooled]
        if lost:
            raise RetexError(
                f"{self._network.name}: layer {lost[0]!r} of {type(self._network.module).__name__} gave no tensor",
                "name other submodules in the attribute `feature_layers` of the network",
            )
        return [pooled[name] for name in self._names]

    def _hook(self, name: str) -> Callable[[torch.nn.Module, object, object], None]:
        def keep(module: torch.nn.Module, arguments: object, output: object) -> None:
            pooled: dict[str, Tensor] | None = getattr(self._run, "pooled", None)
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            if pooled is not None and isinstance(first, Tensor) and first.ndim > 1:
                pooled[name] = pool(first, self._run.mask)

        return keep


def feature_layers(module: torch.nn.Module) -> list[str]:
    """Names of the submodules whose outputs are the layers of a network; empty where nothing tells."""
    named = getattr(module, "feature_layers", None)
    if named is not None:
        known = {name for name, _ in module.named_modules()}
        for name in named:
            if name not in known:
                raise RetexError(f"{type(module).__name__}: no submodule {name!r}, which its feature_layers names")
        return list(named)
    lists = [(name, part) for name, part in module.named_modules() if isinstance(part, LISTS)]
    if not lists:
        return []
    place, longest = max(lists, key=lambda item: len(item[1]))
    return [f"{place}.{child}".lstrip(".") for child, _ in longest.named_children()]


def pool(state: Tensor, mask: Tensor | None) -> Tensor:
    """Average out positions: float [n, width], [n, positions, width] or [n, width, *space] -> float32 [n, width].

    ``mask`` [n, positions] is 1 where a position counts.
    """
    state = state.float()
    if state.ndim == 2:
        return state
    if state.ndim > 3:
        return state.flatten(2).mean(2)
    if mask is None or mask.shape != state.shape[:2]:
        return state.mean(1)
    weight = mask.unsqueeze(-1).float()
    return (state * weight).sum(1) / weight.sum(1).clamp_min(1)


def _stack(layers: Sequence[Tensor]) -> Tensor:
    """[n, widths that may differ] each -> [n, layers, widest]. Layers are normalised later: zeros change nothing."""
    width = max(layer.shape[1] for layer in layers)
    return torch.stack([torch.nn.functional.pad(layer, (0, width - layer.shape[1])) for layer in layers], 1)
