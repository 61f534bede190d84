"""Inputs made without data, for a look at what a network answers where nobody gave any.

Texts of random tokens of the vocabulary; smooth random images, whose spectrum falls with frequency as that of
photographs does; for a network of the user's own whatever its first layer reads. Nothing here looks at a task's data.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from retex_cli.io.inputs import Example
from retex_cli.models.network import Network
from retex_cli.models.passes import CANNOT

PROBES = 32
"""How many inputs are made: enough to tell two sets of weights apart, few enough to run in a second or two."""
TOKENS = 24
"""Of one text."""
PIXELS = (64, 224)
"""Sides of an image that are tried where neither the config nor the processor names one."""
SMOOTH = (1.0, 2.5)
"""Powers of the frequency that amplitudes of an image fall with: from a sharp photograph's to a blurred one's."""
GRAIN = 0.25
"""The strongest white noise that every other image has on top."""
FLAT = 0.1
"""What is left of the contrast of images that say what happens where nothing happens."""
SOURCE = "an input made without data"


def probes(network: Network, seed: int = 0) -> tuple[Example, ...]:
    """``PROBES`` inputs that ``network`` takes, the same ones for the same ``seed``; none where nothing tells what it
    reads."""
    draw = np.random.default_rng(seed)
    for made in _kinds(network, draw):
        if _takes(network, made[0]):
            return made
    return ()


def flat(made: Sequence[Example]) -> tuple[Example, ...]:
    """The images without grain among ``probes``, with next to no contrast: skies and walls, of which photographs have
    more than of detail. None of inputs that are no images."""
    return tuple(found for example in made[::2] if (found := _flat(example)) is not None)


def _flat(example: Example) -> Example | None:
    if isinstance(example.image, np.ndarray):
        image = torch.from_numpy(np.moveaxis(example.image, 2, 0).copy())
        return replace(example, image=np.moveaxis(_less(image).numpy(), 0, 2).copy())
    tensors = example.tensors or {}
    if not tensors or any(image.ndim != 3 for image in tensors.values()):
        return None
    return replace(example, tensors={name: _less(image) for name, image in tensors.items()})


def _less(image: Tensor) -> Tensor:
    """[channels, height, width], of any dtype, its contrast ``FLAT`` of what it was."""
    values = image.float()
    found = torch.lerp(values.mean((1, 2), keepdim=True), values, FLAT)
    return found if image.is_floating_point() else found.round().to(image.dtype)


def _kinds(network: Network, draw: np.random.Generator) -> Iterator[tuple[Example, ...]]:
    named = [network.config.get(key) for key in ("image_size", "input_size")]
    sides = [size for size in named if isinstance(size, int)] or list(PIXELS)
    if network.reads == "texts":
        size = _vocabulary(network.module)
        texts = (network.text_of(draw.integers(0, size, TOKENS).tolist()) for _ in range(PROBES if size else 0))
        yield tuple(Example(text=text, source=SOURCE) for text in texts)
    elif network.reads == "images":
        for side in sides:
            images = [np.rint(255 * image).astype(np.uint8) for image in _images(PROBES, 3, side, draw)]
            yield tuple(Example(image=np.moveaxis(image, 0, 2).copy(), source=SOURCE) for image in images)
    else:
        yield from _tensors(network.module, sides, draw)


def _tensors(module: nn.Module, sides: list[int], draw: np.random.Generator) -> Iterator[tuple[Example, ...]]:
    """What the first layer that has weights reads, as the first argument. Images of bytes are tried first: a network
    that takes them brings them to its own scale."""
    name = next(iter(inspect.signature(module.forward).parameters), None)
    first = next((part for part in module.modules() if isinstance(part, nn.Conv2d | nn.Linear | nn.Embedding)), None)
    if name is None or first is None:
        return
    if isinstance(first, nn.Embedding):
        yield _named(name, torch.from_numpy(draw.integers(0, first.num_embeddings, (PROBES, TOKENS))))
    elif isinstance(first, nn.Linear):
        yield _named(name, torch.from_numpy(draw.standard_normal((PROBES, first.in_features), dtype=np.float32)))
    else:
        for side in sides:
            images = torch.from_numpy(_images(PROBES, first.in_channels, side, draw))
            yield _named(name, (255 * images).round().to(torch.uint8))
            yield _named(name, images)


def _named(name: str, rows: Tensor) -> tuple[Example, ...]:
    return tuple(Example(tensors={name: row}, source=SOURCE) for row in rows)


def _takes(network: Network, example: Example) -> bool:
    try:
        with network.inference():
            network.module(**network.inputs([example]))
    except torch.OutOfMemoryError:
        raise
    except CANNOT:
        return False
    return True


def _vocabulary(module: nn.Module) -> int:
    """Rows of the largest embedding; 0 where there is none."""
    return max((part.num_embeddings for part in module.modules() if isinstance(part, nn.Embedding)), default=0)


def _images(count: int, channels: int, side: int, draw: np.random.Generator) -> NDArray[np.float32]:
    """float32 [count, channels, side, side] from 0 to 1: noise whose amplitude falls with frequency, most of it the
    same in all channels, as light is; every image with a smoothness, brightness and contrast of its own, and every
    other one with grain."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    frequency[0, 0] = np.inf  # the mean is set below
    falls = frequency ** draw.uniform(*SMOOTH, (count, 1, 1, 1))
    spectrum = np.fft.rfft2(draw.standard_normal((count, channels + 1, side, side))) / falls
    noise = np.fft.irfft2(spectrum, s=(side, side))
    noise /= noise.std((2, 3), keepdims=True)
    mixed = 0.9 * noise[:, :1] + 0.45 * noise[:, 1:]
    grain = draw.uniform(0, GRAIN, (count, 1, 1, 1)) * draw.standard_normal((count, channels, side, side))
    grain[::2] = 0
    brightness, contrast = draw.uniform(0.25, 0.75, (count, 1, 1, 1)), draw.uniform(0.05, 0.25, (count, 1, 1, 1))
    found: NDArray[np.float32] = np.clip(brightness + contrast * mixed + grain, 0, 1).astype(np.float32)
    return found
