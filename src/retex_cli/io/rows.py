"""Files of rows: JSON Lines, CSV, TSV, Parquet, plain text. A row that cannot be read is an error in its place."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

from retex_cli.errors import RetexError

Row = tuple[str, Mapping[str, object] | RetexError]
"""Where it stands, and its columns or why it has none."""

_LONGEST_FIELD = 1 << 24


def lines(stream: IO[bytes], name: str) -> Iterator[tuple[str, str | RetexError]]:
    """Lines without their ends, with where they stand; one that is not UTF-8 is an error in its place."""
    for number, line in enumerate(stream, 1):
        source, data = f"{name}:{number}", line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        try:
            yield source, data.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            byte = data[error.start]
            yield source, RetexError(f"{source}: not UTF-8 (byte 0x{byte:02x})", "save the file as UTF-8")


def _lines_of(path: Path) -> Iterator[tuple[str, str | RetexError]]:
    """Lines of a file that are not blank."""
    try:
        with path.open("rb") as file:
            for source, line in lines(file, str(path)):
                if isinstance(line, RetexError) or line.strip():
                    yield source, line
    except OSError as error:
        raise RetexError(f"{path}: cannot be read: {error.strerror}") from None


def parsed(source: str, line: str) -> Mapping[str, object] | RetexError:
    """One line of JSON Lines."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return RetexError(f"{source}: not valid JSON: {error}", "each line is one JSON object")
    if not isinstance(row, dict):
        return RetexError(f"{source}: not a JSON object", 'each line is an object such as {"text": "..."}')
    return row


def _jsonl(path: Path) -> Iterator[Row]:
    for source, line in _lines_of(path):
        yield source, line if isinstance(line, RetexError) else parsed(source, line)


def _plain(path: Path) -> Iterator[Row]:
    for source, line in _lines_of(path):
        yield source, line if isinstance(line, RetexError) else {"text": line}


def _decode(path: Path) -> str:
    """The whole of a file whose rows may span lines."""
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


def _table(delimiter: str) -> Callable[[Path], Iterable[Row]]:
    def rows(path: Path) -> list[Row]:
        text = io.StringIO(_decode(path), newline="")
        before = csv.field_size_limit(_LONGEST_FIELD)
        try:
            return list(_table_rows(path, csv.DictReader(text, delimiter=delimiter, strict=True)))
        finally:
            csv.field_size_limit(before)

    return rows


def _table_rows(path: Path, reader: csv.DictReader[str]) -> Iterator[Row]:
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            source = f"{path}:{reader.reader.line_num}"
            yield source, RetexError(f"{source}: not valid CSV: {error}")
            continue
        source = f"{path}:{reader.line_num}"
        if None in row or None in row.values():
            count = sum(value is not None for value in row.values()) + len(row.get(None) or ()) - (None in row)
            yield source, RetexError(f"{source}: {count} fields, the header has {len(reader.fieldnames or ())}")
        else:
            yield source, row


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
        yield source, _parquet_row(source, row, names)


def _parquet_row(source: str, row: dict[str, object], names: Mapping[str, list[str]]) -> dict[str, object] | RetexError:
    for column, classes in names.items():
        value = row.get(column)
        if isinstance(value, int):
            if not 0 <= value < len(classes):
                return RetexError(f"{source}: the label {value} is not among the file's {len(classes)} classes")
            row[column] = classes[value]
    if isinstance(row.get("image"), dict):
        return RetexError(f"{source}: holds the image itself", "export the images as a folder of files")
    return row


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


READERS: dict[str, Callable[[Path], Iterable[Row]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".parquet": _parquet,
    ".txt": _plain,
}
