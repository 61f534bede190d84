"""Inputs for signatures, identification and evaluation: rows of text, images or ready model inputs.

JSON Lines, CSV, TSV, Parquet or plain text; an image or a folder of images; a safetensors file of model inputs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from retex_cli.errors import RetexError
from retex_cli.io.rows import READERS, lines, parsed
from retex_cli.io.safetensors_file import SafetensorsFile

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
TEXT_COLUMNS = ("text", "sentence", "content")
LABEL_COLUMNS = ("label", "labels")


@dataclass(frozen=True, slots=True)
class Example:
    """One input: a text, an image (its path, or uint8 [height, width, 3]), or the model's input tensors (without a
    batch dimension).

    ``label`` is the name of its class where the file has labels; ``source`` is where it stands, for messages.
    """

    text: str | None = None
    image: Path | NDArray[np.uint8] | None = None
    tensors: Mapping[str, torch.Tensor] | None = None
    label: str | None = None
    source: str = ""


@dataclass(frozen=True, slots=True)
class BadInput:
    """One input that cannot be used, where others of the same file can: ``source`` says where it stands."""

    source: str
    error: RetexError

    bad: ClassVar[bool] = True

    def line(self) -> str:
        """What is wrong and what to do, in one line."""
        return f"error: {self.error.message}" + (f" ({self.error.hint})" if self.error.hint else "")

    def to_json(self) -> dict[str, object]:
        """``{"source", "error", "hint"}``."""
        return {"source": self.source, "error": self.error.message, "hint": self.error.hint}


Item = Example | BadInput


def read_rows(path: str | Path) -> list[Example]:
    """All inputs of a file or folder, in file order (images by name).

    RetexError names the file and the line for what is empty, unreadable or of mixed kinds.
    """
    path = Path(path).expanduser()
    examples = []
    for item in read_items(path):
        if isinstance(item, BadInput):
            raise item.error
        examples.append(item)
    bare = [example for example in examples if example.label is None]
    if bare and len(bare) < len(examples):
        if path.is_dir():
            raise RetexError(f"{bare[0].source}: lies beside the folders of labels", "move it into one of them")
        raise RetexError(f"{bare[0].source}: has no label, other rows have one")
    return examples


def read_items(path: Path) -> Iterator[Item]:
    """The same one by one, and what cannot be used in its place. RetexError where that is the whole file."""
    if path.is_dir():
        yield from _image_folder(path)
        return
    if not path.is_file():
        raise RetexError(f"{path}: no such file or folder of inputs")
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        yield Example(image=path, source=str(path))
    elif suffix == ".safetensors":
        yield from _tensor_rows(path)
    elif suffix not in READERS:
        known = ", ".join([*READERS, ".safetensors"])
        raise RetexError(f"{path}: inputs of an unknown kind", f"use {known}, an image or a folder of images")
    else:
        empty = True
        for source, row in READERS[suffix](path):
            empty = False
            yield _item(path.parent, source, row)
        if empty:
            raise RetexError(f"{path}: holds no inputs", "give a file with at least one row")


def read_stream(stream: IO[bytes], name: str) -> Iterator[Item]:
    """Inputs as their lines arrive: a line that begins with ``{`` is a JSON object as in JSON Lines, paths in it
    relative to the current directory; any other is a text."""
    for source, line in lines(stream, name):
        found = line if isinstance(line, RetexError) else parsed(source, line) if line.startswith("{") else None
        yield _item(Path(), source, {"text": line} if found is None else found)


def _item(folder: Path, source: str, row: Mapping[str, object] | RetexError) -> Item:
    if isinstance(row, RetexError):
        return BadInput(source, row)
    try:
        return _example(folder, source, row)
    except RetexError as error:
        return BadInput(source, error)


def _example(folder: Path, source: str, row: Mapping[str, object]) -> Example:
    label = _first(row, LABEL_COLUMNS)
    if label is not None and not isinstance(label, (str, int)):
        raise RetexError(f"{source}: the label {label!r} is neither text nor a whole number")
    name = None if label is None else str(label)
    if isinstance(row.get("image"), str):
        image = folder / str(row["image"])
        if not image.is_file():
            raise RetexError(f"{source}: no such image: {image}")
        return Example(image=image, label=name, source=source)
    text = _first(row, TEXT_COLUMNS)
    if text is None:
        found = ", ".join(str(key) for key in row) or "none"
        raise RetexError(
            f"{source}: no text; the columns are {found}", f"call the column {TEXT_COLUMNS[0]!r}, images 'image'"
        )
    return Example(text=checked_text(text, source), label=name, source=source)


def checked_text(text: object, source: str) -> str:
    """RetexError unless it is a text that says something."""
    if not isinstance(text, str) or not text.strip():
        raise RetexError(f"{source}: the text is {text!r}", "remove the row or fill it")
    return text


def _first(row: Mapping[str, object], names: Iterable[str]) -> object:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _image_folder(folder: Path) -> list[Example]:
    """Images below a folder; the first level of sub-folders gives the labels."""
    examples = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() and not path.name.startswith("."):
            above = path.relative_to(folder).parts[:-1]
            examples.append(Example(image=path, label=above[0] if above else None, source=str(path)))
    if not examples:
        raise RetexError(f"{folder}: holds no images", f"known are {', '.join(sorted(IMAGE_SUFFIXES))}")
    return examples


def _tensor_rows(path: Path) -> list[Example]:
    """Rows of model inputs: every tensor has the rows first; ``labels`` holds class numbers or is left out.

    The metadata entry ``labels`` may name the classes as a JSON list.
    """
    file = SafetensorsFile(path)
    try:
        tensors = {name: file.read(name) for name in file.tensors}
        names = json.loads(file.metadata.get("labels", "null"))
    except ValueError as error:
        raise RetexError(f"{path}: the metadata entry 'labels' is not valid JSON: {error}") from None
    finally:
        file.close()
    sizes = {name: tensor.shape[0] if tensor.dim() else None for name, tensor in tensors.items()}
    if not sizes or None in sizes.values() or 0 in sizes.values():
        raise RetexError(f"{path}: holds no inputs", "every tensor has one row per input")
    first, count = next(iter(sizes.items()))
    for name, size in sizes.items():
        if size != count:
            raise RetexError(f"{path}: tensor {first!r} has {count} rows, {name!r} has {size}")
    labels = tensors.pop("labels", None)
    if not tensors:
        raise RetexError(f"{path}: holds labels and no inputs")
    return [
        Example(
            tensors={name: tensor[k] for name, tensor in tensors.items()},
            label=None if labels is None else _label_name(path, k, labels[k], names),
            source=f"{path}: row {k + 1}",
        )
        for k in range(count or 0)
    ]


def _label_name(path: Path, row: int, label: torch.Tensor, names: object) -> str:
    number = int(label.item()) if label.numel() == 1 and not label.is_floating_point() else None
    if number is None:
        raise RetexError(f"{path}: row {row + 1}: the label is not one whole number")
    if not isinstance(names, list):
        return str(number)
    if not 0 <= number < len(names):
        raise RetexError(f"{path}: row {row + 1}: the label {number} is not among the {len(names)} names in the file")
    return str(names[number])
