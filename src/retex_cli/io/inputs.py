"""Inputs for signatures, identification and evaluation: rows of text, images or ready model inputs.

JSON Lines, CSV, TSV, Parquet or plain text; an image or a folder of images; a safetensors file of model inputs.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from retex_cli.errors import RetexError
from retex_cli.io.safetensors_file import SafetensorsFile

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
TEXT_COLUMNS = ("text", "sentence", "content")
LABEL_COLUMNS = ("label", "labels")
_LONGEST_FIELD = 1 << 24

Row = tuple[str, Mapping[str, object]]


@dataclass(frozen=True, slots=True)
class Example:
    """One input: a text, the path of an image, or the model's input tensors (without a batch dimension).

    ``label`` is the name of its class where the file has labels; ``source`` is where it stands, for messages.
    """

    text: str | None = None
    image: Path | None = None
    tensors: Mapping[str, torch.Tensor] | None = None
    label: str | None = None
    source: str = ""


def read_rows(path: str | Path) -> list[Example]:
    """All inputs of a file or folder, in file order (images by name).

    RetexError names the file and the line for what is empty, unreadable or of mixed kinds.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _image_folder(path)
    if not path.is_file():
        raise RetexError(f"{path}: no such file or folder of inputs")
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return [Example(image=path, source=str(path))]
    if suffix == ".safetensors":
        return _tensor_rows(path)
    if suffix not in _READERS:
        known = ", ".join([*_READERS, ".safetensors"])
        raise RetexError(f"{path}: inputs of an unknown kind", f"use {known}, an image or a folder of images")
    examples = _examples(path, _READERS[suffix](path))
    if not examples:
        raise RetexError(f"{path}: holds no inputs", "give a file with at least one row")
    return examples


def _examples(path: Path, rows: Iterable[Row]) -> list[Example]:
    examples = [_example(path, source, row) for source, row in rows]
    labelled = [example.label is not None for example in examples]
    if any(labelled) and not all(labelled):
        raise RetexError(f"{examples[labelled.index(False)].source}: has no label, other rows have one")
    return examples


def _example(path: Path, source: str, row: Mapping[str, object]) -> Example:
    label = _first(row, LABEL_COLUMNS)
    if label is not None and not isinstance(label, (str, int)):
        raise RetexError(f"{source}: the label {label!r} is neither text nor a whole number")
    name = None if label is None else str(label)
    if isinstance(row.get("image"), str):
        image = path.parent / str(row["image"])
        if not image.is_file():
            raise RetexError(f"{source}: no such image: {image}")
        return Example(image=image, label=name, source=source)
    text = _first(row, TEXT_COLUMNS)
    if text is None:
        found = ", ".join(str(key) for key in row) or "none"
        raise RetexError(
            f"{source}: no text; the columns are {found}", f"call the column {TEXT_COLUMNS[0]!r}, images 'image'"
        )
    if not isinstance(text, str) or not text.strip():
        raise RetexError(f"{source}: the text is {text!r}", "remove the row or fill it")
    return Example(text=text, label=name, source=source)


def _first(row: Mapping[str, object], names: Iterable[str]) -> object:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _decode(path: Path) -> str:
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise RetexError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RetexError(
            f"{path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x})", "save the file as UTF-8"
        ) from None


def _jsonl(path: Path) -> Iterable[Row]:
    for number, line in enumerate(_decode(path).split("\n"), 1):
        if not line.strip():
            continue
        source = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RetexError(f"{source}: not valid JSON: {error}", "each line is one JSON object") from None
        if not isinstance(row, dict):
            raise RetexError(f"{source}: not a JSON object", 'each line is an object such as {"text": "..."}')
        yield source, row


def _plain(path: Path) -> Iterable[Row]:
    for number, line in enumerate(_decode(path).splitlines(), 1):
        if line.strip():
            yield f"{path}:{number}", {"text": line}


def _table(delimiter: str) -> Callable[[Path], Iterable[Row]]:
    def rows(path: Path) -> Iterable[Row]:
        text = io.StringIO(_decode(path), newline="")
        before = csv.field_size_limit(_LONGEST_FIELD)
        reader = csv.DictReader(text, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                source = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    count = sum(value is not None for value in row.values()) + len(row.get(None) or ()) - (None in row)
                    raise RetexError(f"{source}: {count} fields, the header has {len(reader.fieldnames or ())}")
                yield source, row
        except csv.Error as error:
            raise RetexError(f"{path}:{reader.reader.line_num}: not valid CSV: {error}") from None
        finally:
            csv.field_size_limit(before)

    return rows


def _parquet(path: Path) -> Iterable[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise RetexError(f"{path}: reading Parquet needs pyarrow", "pip install 'retex-cli[parquet]'") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise RetexError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None
    names = _class_names(table.schema.metadata or {})
    for number, row in enumerate(table.to_pylist(), 1):
        source = f"{path}: row {number}"
        for column, classes in names.items():
            value = row.get(column)
            if isinstance(value, int):
                if not 0 <= value < len(classes):
                    raise RetexError(f"{source}: the label {value} is not among the file's {len(classes)} classes")
                row[column] = classes[value]
        if isinstance(row.get("image"), dict):
            raise RetexError(f"{source}: holds the image itself", "export the images as a folder of files")
        yield source, row


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """Names of integer classes, as the datasets library notes them in the schema."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError):
        return {}


_READERS: dict[str, Callable[[Path], Iterable[Row]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".parquet": _parquet,
    ".txt": _plain,
}


def _image_folder(folder: Path) -> list[Example]:
    """Images below a folder; the first level of sub-folders gives the labels."""
    examples = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() and not path.name.startswith("."):
            above = path.relative_to(folder).parts[:-1]
            examples.append(Example(image=path, label=above[0] if above else None, source=str(path)))
    if not examples:
        raise RetexError(f"{folder}: holds no images", f"known are {', '.join(sorted(IMAGE_SUFFIXES))}")
    loose = [example for example in examples if example.label is None]
    if loose and len(loose) < len(examples):
        raise RetexError(f"{loose[0].source}: lies beside the folders of labels", "move it into one of them")
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
