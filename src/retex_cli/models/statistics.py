"""What a fine-tuned model tells about its own inputs: Gram matrices of its layers' inputs, and Fisher information.

Both are sums over inputs, made batch by batch in several threads and added in the order of the batches.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from retex_cli.io.inputs import Example
from retex_cli.models.network import Network
from retex_cli.models.processor import batches
from retex_cli.parallel import ordered_map
from retex_cli.progress import Progress

GRAM_BYTES = 1 << 30
"""Gram matrices are collected for as many layers at a time as fit here; more layers take another pass."""

UNLIKELY = 1e-3
"""Classes less likely than this are left out of the expectation over a model's answers."""


def gram_layers(module: nn.Module) -> dict[str, int]:
    """Weight name -> number of inputs ``n`` of every layer whose output is linear in ``n`` inputs, seen as a matrix.

    Linear layers and ungrouped convolutions (their weight is ``d_out x rest``). Others (embeddings, grouped
    convolutions, layers of a kind of their own) are not among them.
    """
    layers = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and _plain(layer)):
            layers[f"{name}.weight"] = layer.weight[0].numel()
    return layers


def _plain(layer: nn.Conv2d) -> bool:
    return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def input_grams(
    network: Network, examples: Sequence[Example], names: Collection[str], batch_size: int, threads: int,
    progress: Progress,
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """``(weight name, X^T X)`` for the layers ``names``: ``X [positions, n]`` are a layer's inputs; float32 ``[n, n]``.

    Positions that the attention mask leaves out do not count. One step of progress an example and pass.
    """
    plan = batches(examples, batch_size)
    groups = list(_groups({name: n for name, n in gram_layers(network.module).items() if name in names}))
    for group in groups:
        progress.start("statistics of the layers' inputs", len(examples))
        sums: dict[str, Tensor] = {}
        with _Listening(network.module, group) as listening:

            def forward(batch: list[int], listening: _Listening = listening) -> dict[str, Tensor]:
                return listening.grams(network, [examples[i] for i in batch])

            for batch, found in zip(plan, ordered_map(forward, plan, threads), strict=True):
                for name, gram in found.items():
                    sums[name] = sums[name] + gram if name in sums else gram
                progress.advance(len(batch))
        yield from sums.items()


def _groups(layers: Mapping[str, int]) -> Iterator[list[str]]:
    """Layers in order, as many together as fit into ``GRAM_BYTES``."""
    group: list[str] = []
    used = 0
    for name, n in layers.items():
        if group and used + 4 * n * n > GRAM_BYTES:
            yield group
            group, used = [], 0
        group.append(name)
        used += 4 * n * n
    if group:
        yield group


class _Listening:
    """Forward hooks on some layers; each thread's forward pass gathers its own Gram matrices."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self._module, self._names = module, set(names)
        self._here = threading.local()

    def __enter__(self) -> _Listening:
        self._hooks = [
            layer.register_forward_hook(self._hook(f"{name}.weight"))
            for name, layer in self._module.named_modules()
            if f"{name}.weight" in self._names
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def grams(self, network: Network, examples: Sequence[Example]) -> dict[str, Tensor]:
        """The Gram matrices of one batch, on the CPU."""
        inputs = network.inputs(examples)
        self._here.mask, self._here.found = inputs.get("attention_mask"), {}
        with network.inference():
            network.logits(inputs)
        return {name: gram.cpu() for name, gram in self._here.found.items()}

    def _hook(self, name: str):  # type: ignore[no-untyped-def]
        def hook(layer: nn.Module, given: tuple[Tensor, ...], output: object) -> None:
            del output
            x = positions(layer, given[0], self._here.mask).float()
            with torch.autocast(x.device.type, enabled=False):
                gram = x.T @ x
            found = self._here.found
            found[name] = found[name] + gram if name in found else gram  # a layer may be used twice

        return hook


def positions(layer: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """A layer's input as rows ``[positions, n]`` that its weight, as ``d_out x n``, is applied to."""
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)
        patches = functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return patches.transpose(1, 2).flatten(0, 1)
    if mask is not None and x.dim() > 2 and mask.shape == x.shape[:2]:
        return x[mask.bool()].flatten(0, -2)
    return x.flatten(0, -2)


def fisher_diagonal(
    network: Network, examples: Sequence[Example], names: Collection[str], threads: int, progress: Progress
) -> dict[str, Tensor]:
    """Parameter name -> mean over inputs of ``E_y (d log p(y | x) / d theta)^2``: float32, shaped as the parameter.

    arXiv 2111.09832, equation 3, with the expectation over the model's own answers computed exactly, apart from classes
    less likely than ``UNLIKELY``. One backward pass per input and likely class.
    """
    everything = dict(network.module.named_parameters(remove_duplicate=False))
    wanted = {name: parameter for name, parameter in everything.items() if name in names}
    parameters = list(wanted.values())
    progress.start("Fisher information", len(examples))
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]

    def one(example: Example) -> list[tuple[float, list[Tensor | None]]]:
        return _squared_gradients(network, example, parameters)

    with _gradients(network.module):
        for answers in ordered_map(one, examples, threads):
            for share, gradients in answers:
                for total, gradient in zip(sums, gradients, strict=True):
                    if gradient is not None:
                        total.addcmul_(gradient.float(), gradient.float(), value=share)
            progress.advance()
    return {name: total.div_(len(examples)).cpu() for name, total in zip(wanted, sums, strict=True)}


def _squared_gradients(
    network: Network, example: Example, parameters: list[nn.Parameter]
) -> list[tuple[float, list[Tensor | None]]]:
    """Probability and gradient of the log-likelihood of each likely answer to one input."""
    with torch.enable_grad():
        likelihood = network.logits(network.inputs([example])).float().log_softmax(-1)[0]
        shares = likelihood.detach().exp()
        likely = (shares >= UNLIKELY).nonzero().flatten().tolist()
        return [
            (
                float(shares[k]),
                list(torch.autograd.grad(likelihood[k], parameters, retain_graph=k != likely[-1], allow_unused=True)),
            )
            for k in likely
        ]


@contextmanager
def _gradients(module: nn.Module) -> Iterator[None]:
    """Every parameter takes part in gradients, and is as it was afterwards."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    module.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
