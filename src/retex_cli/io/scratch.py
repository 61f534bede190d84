"""Finished pieces of a long job on disk, beside its output, so that an interrupted job goes on where it was.

The folder ``.NAME.KEY.parts`` stands beside the output ``NAME`` until that is written. The key covers all that the
pieces depend on, so what is found under it is what would be made again.
"""

from __future__ import annotations

import glob
import hashlib
import os
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from retex_cli.errors import RetexError
from retex_cli.io.artefact import Stored
from retex_cli.io.layout import TensorSpec, make_shard
from retex_cli.io.output import Output, write_error
from retex_cli.io.replace import remove
from retex_cli.io.safetensors_file import SafetensorsFile
from retex_cli.io.tensors import byte_view

_CHECK = "crc32"


class Scratch:
    """Named pieces, each some tensors and texts; written whole or not at all, from any thread."""

    def __init__(self, output: str | Path, key: str) -> None:
        """``key``: hexadecimal digest of everything that decides what the pieces hold."""
        self._target = Output.parse(output).target
        self._folder = self._target.with_name(f".{self._target.name}.{key[:16]}.parts")
        self._known: set[str] = set()
        self._lock = threading.Lock()

    def put(self, name: str, tensors: Mapping[str, Tensor], texts: Mapping[str, str] | None = None) -> None:
        """Keep a piece; ``tensors`` on the CPU. RetexError for a full disk."""
        whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
        check = _checksum(whole)
        specs = [TensorSpec(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in whole.items()]
        shard = make_shard(name, specs, {**(texts or {}), _CHECK: check})
        path = self._path(name)
        new = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with new.open("wb") as file:
                file.write(shard.header)
                for key, tensor in whole.items():
                    file.seek(shard.starts[key])
                    file.write(byte_view(tensor))
            new.replace(path)
            with self._lock:
                self._known.add(name)
        except OSError as error:
            new.unlink(missing_ok=True)
            raise write_error(self._target, error, 0, shard.size) from error

    def get(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """A piece as it was put; None where there is none, or a damaged one.

        Tensors are mapped where they lie: they take no memory of the process until they are written to, and stay
        readable when the piece is dropped.
        """
        try:
            file = SafetensorsFile(self._path(name))
        except RetexError:
            return None
        tensors = {key: file.mapped(key) for key in file.tensors}
        file.close()
        with self._lock:
            self._known.add(name)
        return (tensors, dict(file.metadata)) if file.metadata.get(_CHECK) == _checksum(tensors) else None

    def stored(self, name: str, key: str) -> Stored:
        """One tensor of a piece that is there, read when its turn comes."""
        file = SafetensorsFile(self._path(name))
        info = file.tensors[key]
        file.close()
        return Stored(info.dtype, info.shape, lambda: self._read(name, key))

    def drop(self, start: str) -> None:
        """Forget the pieces whose names begin so, of those that this object put or got."""
        with self._lock:
            gone = {name for name in self._known if name.startswith(start)}
            self._known -= gone
        for name in gone:
            self._path(name).unlink(missing_ok=True)

    def remove(self) -> None:
        """Forget everything, and what jobs with other keys have left beside this output."""
        for folder in self._target.parent.glob(f".{glob.escape(self._target.name)}.*.parts"):
            remove(folder)

    def _path(self, name: str) -> Path:
        return self._folder / hashlib.sha256(name.encode()).hexdigest()[:32]

    def _read(self, name: str, key: str) -> Tensor:
        file = SafetensorsFile(self._path(name))
        try:
            return file.read(key)
        finally:
            file.close()


def as_tensor(data: bytes) -> Tensor:
    """uint8 [bytes]."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Of all data, in the order of names."""
    check = 0
    for name in sorted(tensors):
        check = zlib.crc32(byte_view(tensors[name]), check)
    return f"{check:08x}"
