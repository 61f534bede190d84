"""Torch pickles (``.bin``, ``.pt``, ``.pth``) through the weights-only loader: tensors, and nothing that runs code."""

from __future__ import annotations

import pickle
import threading
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from retex_cli.errors import RetexError
from retex_cli.io.tensors import TensorInfo, check_request

_WRAPPERS = ("state_dict", "model_state_dict", "model")


class TorchFile:
    """A pickled state dict. Data stays on the disk (memory-mapped) where the file's format allows that."""

    metadata: Mapping[str, str] = MappingProxyType({})

    def __init__(self, path: Path) -> None:
        self.path = path
        state = _state_dict(path, _load(path))
        self._tensors: dict[str, torch.Tensor] = {}
        aliases: dict[str, str] = {}
        kept: dict[tuple[object, ...], str] = {}
        for name, tensor in state.items():
            place = _place(tensor)
            if tensor.numel() and place in kept:
                aliases[name] = kept[place]
            else:
                kept[place] = name
                self._tensors[name] = tensor
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {name: TensorInfo(name, tensor.dtype, tuple(tensor.shape), path) for name, tensor in self._tensors.items()}
        )
        self.aliases: Mapping[str, str] = MappingProxyType(aliases)
        self._lock = threading.Lock()
        self._flattened: tuple[str, torch.Tensor] | None = None

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor in memory of its own, row-major."""
        return self._tensors[name].detach().clone(memory_format=torch.contiguous_format)

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Elements ``[start, start + out.numel())`` of the flattened tensor, converted to ``out.dtype``."""
        check_request(self.tensors[name], start, out)
        out.copy_(self._flat(name)[start : start + out.numel()])

    def _flat(self, name: str) -> torch.Tensor:
        """The tensor as one row; a transposed or sliced one is copied once and kept until another is asked for."""
        tensor = self._tensors[name].detach()
        if tensor.is_contiguous():
            return tensor.reshape(-1)
        with self._lock:
            if self._flattened is None or self._flattened[0] != name:
                self._flattened = (name, tensor.reshape(-1))
            return self._flattened[1]

    def unchanged(self) -> None:
        """It is read through a map, or was read when it was opened: nothing that the system says now is sure."""

    def close(self) -> None:
        """Give back the memory map."""
        self._tensors.clear()
        self._flattened = None


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    """Two names with the same place are one tensor: tied weights."""
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _load(path: Path) -> object:
    try:
        with warnings.catch_warnings(action="ignore"):  # remarks on odd pickles; what matters is whether they load
            if zipfile.is_zipfile(path):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return torch.load(path, map_location="cpu", weights_only=True)  # the format from before torch 1.6
    except pickle.UnpicklingError as error:
        raise RetexError(
            f"{path}: the weights-only loader refuses it: {_reason(error)}",
            "if you trust the file, save its state_dict as safetensors and use that",
        ) from None
    except (FileNotFoundError, PermissionError) as error:
        raise RetexError(f"{path}: cannot be read: {error.strerror}") from None
    except (RuntimeError, OSError, EOFError, LookupError, ValueError, AttributeError, TypeError) as error:
        raise RetexError(
            f"{path}: a damaged or truncated torch file: {_reason(error)}", "download or export the file again"
        ) from None


def _reason(error: Exception) -> str:
    """The one line of torch's long message that says what was found."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("Unsupported", "GLOBAL", "WeightsUnpickler error"))]
    return (telling or lines or [type(error).__name__])[0]


def _state_dict(path: Path, loaded: object) -> dict[str, torch.Tensor]:
    """The mapping of names to tensors, out of the usual wrappers. RetexError for anything else."""
    if isinstance(loaded, dict):
        for key in _WRAPPERS:
            if isinstance(loaded.get(key), dict):
                loaded = loaded[key]
                break
    if not isinstance(loaded, dict) or not loaded:
        raise RetexError(f"{path}: holds a {type(loaded).__name__}, not a state dict of tensors")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise RetexError(
                f"{path}: entry {name!r} is a {type(value).__name__}, not a tensor",
                "save the model's state_dict alone",
            )
        if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
            raise RetexError(f"{path}: tensor {name!r} is not a plain dense tensor", "save it dense and dequantised")
    return dict(loaded)
