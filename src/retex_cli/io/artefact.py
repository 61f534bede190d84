"""The files of our own: ordinary safetensors whose header says what they are and in which version."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from retex_cli.errors import RetexError, UsageError
from retex_cli.io.checkpoint import Checkpoint, open_checkpoint
from retex_cli.io.writer import Output, TensorSpec, open_output

FORMAT_KEY = "format"
VERSION_KEY = "format_version"


def check_artefact(path: str | Path, *, overwrite: bool, inputs: Sequence[Path] = (), nbytes: int = 0) -> Output:
    """The output that an artefact of about ``nbytes`` will be written to, refused now if it would be refused later.

    UsageError unless the name ends in ``.safetensors``; RetexError for what exists, is an input or cannot be written.
    """
    output = Output.parse(path)
    if output.kind != "file":
        raise UsageError(f"{path}: an artefact is one safetensors file", "give a name that ends in .safetensors")
    output.check(overwrite, inputs, nbytes)
    return output


@dataclass(frozen=True)
class Stored:
    """A tensor that lies elsewhere and is read when its turn comes; ``read`` gives it on the CPU."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def stored_in(file: Checkpoint, name: str) -> Stored:
    """A tensor of an opened file."""
    info = file.tensors[name]
    return Stored(info.dtype, info.shape, lambda: file.read(name))


def write_artefact(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor | Stored],
    metadata: Mapping[str, str],
    *,
    format: str,
    version: int,
    overwrite: bool = False,
) -> int:
    """Write CPU tensors in the order of the mapping behind a header with format, version and ``metadata``.

    What is stored elsewhere is copied one tensor at a time; it may lie in the file that is replaced. Returns the size
    of the file in bytes. RetexError as for any output.
    """
    output = check_artefact(path, overwrite=overwrite)
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    header = {FORMAT_KEY: format, VERSION_KEY: str(version), **metadata}
    with open_output(output, specs, metadata=header, overwrite=overwrite) as writer:
        for tensor in tensors.values():
            writer.write(tensor.read() if isinstance(tensor, Stored) else tensor)
    return output.target.stat().st_size


def open_artefact(path: str | Path, *, format: str, versions: Collection[int]) -> Checkpoint:
    """Open an artefact by its header. RetexError unless it is of this format and one of these versions."""
    if not Path(path).expanduser().exists():
        raise RetexError(f"{path}: no such file", f"a {format} file is expected here")
    if Path(path).expanduser().is_dir():
        raise RetexError(f"{path}: a folder, not a {format} file")
    file = open_checkpoint(path)
    found, version = file.metadata.get(FORMAT_KEY), file.metadata.get(VERSION_KEY)
    if found != format:
        file.close()
        what = "a checkpoint" if found in ("pt", None) else f"a {found} file"
        raise RetexError(f"{path}: {what}, not a {format} file", "check which file is meant")
    if version not in {str(known) for known in versions}:
        file.close()
        known_versions = ", ".join(str(known) for known in sorted(versions))
        raise RetexError(
            f"{path}: {format} version {version}, this retex reads {known_versions}",
            "use the retex that wrote it, or make the file again",
        )
    return file
