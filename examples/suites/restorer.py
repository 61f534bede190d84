"""A plain convolutional network that restores images: the `model = "restorer:build"` of the restoration family.

No normalisation, no bottleneck: six 3 x 3 convolutions of 64 channels around a skip, as in https://arxiv.org/abs/1608.03981
without its BatchNorm. Nothing rescales what one layer gets wrong before the next sees it.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from torch import Tensor, nn

CHANNELS, LAYERS = 64, 6


class Restorer(nn.Module):
    """Degraded images to restored ones: float [n, 3, height, width], 0 to 1."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, *[CHANNELS] * (LAYERS - 1), 3]
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.layers[-1].weight)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """What is wrong with the image is taken from it."""
        state = pixel_values
        for layer in self.layers[:-1]:
            state = layer(state).relu()
        found: Tensor = pixel_values + self.layers[-1](state)
        return found


def build(config: Mapping[str, object]) -> nn.Module:
    """The network; nothing in ``config`` changes it."""
    del config
    return Restorer()
