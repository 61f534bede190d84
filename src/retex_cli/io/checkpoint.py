"""Checkpoints in: one reading face for files, folders, shards, Hub ids and adapters. Headers first, data on demand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Self

import torch

from retex_cli.errors import RetexError
from retex_cli.io.folders import Weights, find_weights, read_index, read_json, refuse_adapter, side_files
from retex_cli.io.safetensors_file import SafetensorsFile
from retex_cli.io.tensors import TensorFile, TensorInfo
from retex_cli.progress import Progress

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint", "open_expert"]

_TORCH_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}

LowRank = tuple[torch.Tensor, torch.Tensor, float]


class Checkpoint:
    """Named tensors of one model, wherever they are stored.

    ``reference`` is what the user wrote, ``revision`` the commit if it came from the Hub, ``folder`` where the side
    files live (None for a bare file), ``config`` the parsed ``config.json``. ``tensors`` is in file order; ``aliases``
    maps names that share storage with a kept tensor to that tensor's name. Reads may come from several threads.
    """

    def __init__(
        self,
        reference: str,
        parts: Sequence[TensorFile],
        *,
        folder: Path | None = None,
        revision: str | None = None,
        config: Mapping[str, object] | None = None,
    ) -> None:
        self.reference = reference
        self.revision = revision
        self.folder = folder
        self.config = config
        self._parts = tuple(parts)
        self._home: dict[str, TensorFile] = {}
        tensors: dict[str, TensorInfo] = {}
        aliases: dict[str, str] = {}
        metadata: dict[str, str] = {}
        for part in parts:
            for name, info in part.tensors.items():
                if name in tensors:
                    raise RetexError(
                        f"{reference}: tensor {name!r} is in two files, {tensors[name].file.name} and {part.path.name}"
                    )
                tensors[name], self._home[name] = info, part
            aliases.update(part.aliases)
            metadata.update(part.metadata)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        self.aliases: Mapping[str, str] = MappingProxyType({a: k for a, k in aliases.items() if a not in tensors})
        self.metadata: Mapping[str, str] = MappingProxyType(metadata)

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files of this checkpoint, in order."""
        return tuple(part.path for part in self._parts)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, from the headers."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor in memory of its own, stored type and shape. KeyError for an unknown name."""
        name = self.aliases.get(name, name)
        return self._home[name].read(name)

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every name and its tensor, read when it is its turn."""
        return ((name, self.read(name)) for name in self.tensors)

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Elements ``[start, start + out.numel())`` of the flattened tensor, converted to ``out.dtype``.

        ``out`` is 1-D, contiguous, on the CPU. Nothing else of the tensor is read.
        """
        name = self.aliases.get(name, name)
        self._home[name].read_into(name, start, out)

    def low_rank(self, name: str) -> LowRank | None:
        """``(B, A, scaling)`` where the tensor is a base tensor plus ``scaling * B @ A``; None for ordinary ones."""
        del name
        return None

    def side_files(self) -> dict[str, Path]:
        """Tokenizer, processor, generation config, chat template, config: what travels with the weights."""
        return side_files(self.folder) if self.folder else {}

    def fetch(self, progress: Progress | None = None) -> None:
        """Bring weights that are not on this machine yet; reading does the same, silently, when it has to."""
        del progress

    def weight_files(self) -> Sequence[TensorFile]:
        """The files whose tensors are, as they are stored, this checkpoint's; none where those are made of more."""
        return self._parts

    def close(self) -> None:
        """Give the files back; closing twice is fine."""
        for part in self._parts:
            part.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_file(path: Path) -> TensorFile:
    """One weight file by its suffix: safetensors, or a torch pickle through the weights-only loader."""
    if path.suffix in _TORCH_SUFFIXES:
        from retex_cli.io.torch_file import TorchFile

        return TorchFile(path)
    return SafetensorsFile(path)


def open_parts(paths: Sequence[Path]) -> list[TensorFile]:
    """Several weight files; when one is damaged the others are given back."""
    parts: list[TensorFile] = []
    with contextlib.ExitStack() as undo:
        for path in paths:
            part = open_file(path)
            undo.callback(part.close)
            parts.append(part)
        undo.pop_all()
    return parts


def check_index(index: Path, mapping: Mapping[str, str], parts: Sequence[TensorFile]) -> None:
    """Every tensor that the index promises must be in the shard it names."""
    shards = {part.path.name: part for part in parts}
    for name, file in mapping.items():
        part = shards[Path(file).name]
        if name not in part.tensors and name not in part.aliases:
            raise RetexError(
                f"{index}: tensor {name!r} should be in {file}, which does not have it",
                "the shards are of different exports: download or export the model again",
            )


def _open_indexed(index: Path) -> list[TensorFile]:
    mapping = read_index(index)
    files = list(dict.fromkeys(mapping.values()))
    for file in files:
        if not (index.parent / file).is_file():
            count = sum(1 for other in mapping.values() if other == file)
            raise RetexError(
                f"{index.parent / file}: missing shard: {index.name} expects {count} tensors in it",
                "download or export the model again",
            )
    parts = open_parts([index.parent / file for file in sorted(files)])
    try:
        check_index(index, mapping, parts)
    except RetexError:
        for part in parts:
            part.close()
        raise
    return parts


def open_folder(folder: Path, reference: str, revision: str | None = None) -> Checkpoint:
    """A model folder: single file, shards with index, or one other safetensors file. Adapters are refused here."""
    weights = find_weights(folder, {path.name for path in folder.iterdir() if path.is_file()})
    refuse_adapter(reference, weights)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    path = folder / weights.file
    parts = _open_indexed(path) if weights.indexed else open_parts([path])
    return Checkpoint(reference, parts, folder=folder, revision=revision, config=config)


def _local(reference: str | Path) -> Path | None:
    path = Path(reference).expanduser()
    return path if path.exists() else None


def open_checkpoint(reference: str | Path) -> Checkpoint:
    """Open a file, a folder or a Hub id ``org/name[@revision]`` by its headers; no tensor data is read.

    RetexError names the file, and the tensor where there is one, when anything about it is damaged.
    """
    path = _local(reference)
    if path is None:
        from retex_cli.io.hub import open_hub

        return open_hub(str(reference))
    if path.is_dir():
        return open_folder(path, str(reference))
    return Checkpoint(str(reference), open_parts([path]))


def adapter_weights(folder: Path) -> Weights | None:
    """The adapter file of a folder that holds a PEFT adapter and no model; None otherwise."""
    if not (folder / "adapter_config.json").is_file():
        return None
    weights = find_weights(folder, {path.name for path in folder.iterdir() if path.is_file()})
    return weights if weights.kind == "adapter" else None


def open_expert(reference: str | Path, base: Checkpoint) -> Checkpoint:
    """Like ``open_checkpoint``, and a PEFT LoRA adapter becomes the expert that it makes of ``base``."""
    path = _local(reference)
    if path is None:
        from retex_cli.io.hub import HubCheckpoint, resolve

        snapshot = resolve(str(reference))
        if snapshot.weights.kind != "adapter":
            return HubCheckpoint(snapshot)
        for name in ("adapter_config.json", snapshot.weights.file):
            snapshot.bring(name)
        snapshot.side_files()
        path, revision = snapshot.folder, snapshot.commit
    else:
        revision = None
    if path.is_dir() and (weights := adapter_weights(path)):
        from retex_cli.io.lora import LoraCheckpoint

        return LoraCheckpoint(str(reference), path, weights.file, base, revision=revision)
    return open_checkpoint(reference)
