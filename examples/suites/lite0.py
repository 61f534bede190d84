"""EfficientNet-Lite0 as a plain ``nn.Module``: the `model = "lite0:build"` of the vision suite.

The network of https://arxiv.org/abs/1905.11946 in its Lite form: no squeeze-and-excitation, ReLU6. Its tensors have the
names of the released ImageNet weights, which pad as TensorFlow does.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Of every stage: expansion, channels, blocks, stride of the first block, kernel.
STAGES = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5))
LAST_STAGE = (6, 320, 1, 1, 3)
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class SameConv(nn.Conv2d):
    """A convolution without bias, padded so that its output is the input's size over the stride, rounded up."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, state: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        # Odd padding goes last, as in TensorFlow, so it cannot be left to the convolution.
        short = [max(-(-size // stride) * stride - stride + kernel - size, 0) for size in state.shape[2:]]
        if any(total % 2 for total in short):
            state = functional.pad(state, [part for total in short[::-1] for part in (total // 2, total - total // 2)])
            short = [0, 0]
        return functional.conv2d(state, self.weight, None, stride, [total // 2 for total in short], 1, self.groups)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """Expand, filter each channel by itself, project; the input is added where the shape allows."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int, kernel: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.adds = stride == 1 and inputs == outputs
        self.expands = expansion != 1
        if self.expands:
            self._expand_conv = SameConv(inputs, inner, 1)
            self._bn0 = _norm(inner)
        self._depthwise_conv = SameConv(inner, inner, kernel, stride, groups=inner)
        self._bn1 = _norm(inner)
        self._project_conv = SameConv(inner, outputs, 1)
        self._bn2 = _norm(outputs)

    def forward(self, state: Tensor) -> Tensor:
        found = functional.relu6(self._bn0(self._expand_conv(state))) if self.expands else state
        found = functional.relu6(self._bn1(self._depthwise_conv(found)))
        found = self._bn2(self._project_conv(found))
        return found + state if self.adds else found


class EfficientNetLite0(nn.Module):
    """Images to logits, or to 1,280 features where ``classes`` is None."""

    def __init__(self, classes: int | None) -> None:
        super().__init__()
        self._conv_stem = SameConv(3, 32, 3, 2)
        self._bn0 = _norm(32)
        self._blocks = nn.ModuleList()
        width = 32
        for expansion, channels, count, stride, kernel in (*STAGES, LAST_STAGE):
            for k in range(count):
                self._blocks.append(Block(width, channels, expansion, 1 if k else stride, kernel))
                width = channels
        self._conv_head = SameConv(width, 1280, 1)
        self._bn1 = _norm(1280)
        self._fc = nn.Identity() if classes is None else nn.Linear(1280, classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """``pixel_values``: [n, 3, height, width], uint8 or float, 0 to 255. Float [n, classes]."""
        mean, deviation = (torch.tensor(c, device=pixel_values.device).view(3, 1, 1) for c in (MEAN, DEVIATION))
        state = ((pixel_values.float() / 255 - mean) / deviation).contiguous(memory_format=torch.channels_last)
        state = functional.relu6(self._bn0(self._conv_stem(state)))
        for block in self._blocks:
            state = block(state)
        state = functional.relu6(self._bn1(self._conv_head(state)))
        return self._fc(state.mean((2, 3)))


def build(config: Mapping[str, object]) -> nn.Module:
    """The network of a ``config.json``: with a head where it names labels."""
    labels = config.get("id2label")
    return EfficientNetLite0(len(labels) if isinstance(labels, Mapping) else None)
