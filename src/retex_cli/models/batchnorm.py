"""Running statistics of BatchNorm layers, measured again on inputs.

Averages of the experts' statistics belong to no network: the merged one has activations of its own (arXiv 2211.08403
measures how much that costs a merge).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from retex_cli.models.network import Network
from retex_cli.progress import Progress


def batchnorm_layers(module: nn.Module) -> dict[str, _BatchNorm]:
    """The layers that keep running statistics, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and layer.track_running_stats
    }


def measure_batchnorm(network: Network, batches: Sequence[dict[str, Tensor]], progress: Progress) -> dict[str, Tensor]:
    """Buffer name -> running mean or variance over ``batches`` of model inputs, every batch weighing the same.

    The layers normalise by the batch at hand meanwhile, as in training; all other layers stay as in use. The network
    keeps the new statistics.
    """
    layers = batchnorm_layers(network.module)
    momentum = {name: layer.momentum for name, layer in layers.items()}
    for layer in layers.values():
        layer.reset_running_stats()
        layer.momentum = None  # the plain mean over batches
        layer.train()
    progress.start("BatchNorm statistics", len(batches))
    try:
        with torch.no_grad():
            for inputs in batches:
                network.logits(inputs)
                progress.advance()
    finally:
        for name, layer in layers.items():
            layer.momentum = momentum[name]
            layer.eval()
    return {
        f"{name}.{kind}": buffer.detach().cpu().clone()
        for name, layer in layers.items()
        for kind in ("running_mean", "running_var")
        if isinstance(buffer := getattr(layer, kind), Tensor)
    }
