"""A PEFT LoRA adapter as the expert that it makes of its base, row block by row block, never whole in memory."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from retex_cli.errors import RetexError
from retex_cli.io.checkpoint import Checkpoint, LowRank, open_file
from retex_cli.io.folders import read_json, side_files
from retex_cli.io.lora_keys import AdapterKeys, Factors, sort_keys
from retex_cli.io.naming import Prefix, find_prefix
from retex_cli.io.tensors import TensorFile, TensorInfo, check_request

#: Elements of B A computed at once, on a grid that depends on the tensor alone: the same bits for any chunking.
_BLOCK = 1 << 16

_HEADS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}


class LoraCheckpoint(Checkpoint):
    """Base tensors, those with factors plus ``scaling * B @ A``, and what the adapter stores whole (heads, biases).

    Names are those of the model that the adapter was trained on: the base's, with its prefix if it has another one.
    Tensors with factors have the wider type of base and factors.
    """

    def __init__(self, reference: str, folder: Path, file: str, base: Checkpoint, revision: str | None = None) -> None:
        self._base = base
        self._adapter: TensorFile = open_file(folder / file)
        settings = read_json(folder / "adapter_config.json")
        keys = sort_keys(self._adapter.path, self._adapter.tensors, settings, folder / "adapter_config.json")
        self._factors: Mapping[str, Factors] = keys.factors
        self._whole = dict(keys.whole)
        self._local = threading.local()
        super().__init__(reference, [self._adapter], folder=folder, revision=revision)
        self._base_names = self._names_of_base(keys)
        tensors = {name: self._info(name) for name in self._base_names}
        tensors.update({name: self._info(name) for name in self._whole if name not in tensors})
        self.tensors = tensors
        self._check_targets()
        renamed = {ours: name for name, ours in self._base_names.items()}
        self.aliases = {
            dropped: renamed[kept] for dropped, kept in base.aliases.items() if renamed[kept] not in self._factors
        }
        self.metadata = self._adapter.metadata
        self.config = self._read_config(settings)

    def _names_of_base(self, keys: AdapterKeys) -> dict[str, str]:
        """The model's name of each tensor of the base -> the base's name."""
        theirs = {name: factors.shape for name, factors in keys.factors.items()}
        theirs.update({name: self._adapter.tensors[stored].shape for name, stored in keys.whole.items()})
        base = {name: info.shape for name, info in self._base.tensors.items()}
        prefix = find_prefix(base, theirs, self.reference)
        return {_rename(name, prefix): name for name in base}

    def _info(self, name: str) -> TensorInfo:
        if name in self._whole:
            stored = self._adapter.tensors[self._whole[name]]
        else:
            stored = self._base.tensors[self._base_names[name]]
        dtype, file = stored.dtype, stored.file
        if name in self._factors:
            for factor in (self._factors[name].a, self._factors[name].b):
                dtype = torch.promote_types(dtype, self._adapter.tensors[factor].dtype)
            file = self._adapter.path
        return TensorInfo(name, dtype, stored.shape, file)

    def _check_targets(self) -> None:
        for name, factors in self._factors.items():
            if name not in self.tensors:
                raise RetexError(
                    f"{self._adapter.path}: changes the tensor {name!r}, which the base {self._base.reference} lacks",
                    "give the base that the adapter was trained on",
                )
            if self.tensors[name].shape != factors.shape:
                raise RetexError(
                    f"{self._adapter.path}: changes {name!r} with the shape {list(factors.shape)}, in the base "
                    f"{self._base.reference} it has {list(self.tensors[name].shape)}",
                    "give the base that the adapter was trained on",
                )

    def _read_config(self, settings: Mapping[str, object]) -> Mapping[str, object] | None:
        """The folder's own config, or the base's with the head that the adapter adds."""
        if self.folder is not None and (self.folder / "config.json").is_file():
            return read_json(self.folder / "config.json")
        if self._base.config is None:
            return None
        config = copy.deepcopy(dict(self._base.config))
        head = _HEADS.get(str(settings.get("task_type")))
        architectures = config.get("architectures")
        if head and isinstance(architectures, list) and architectures:
            config["architectures"] = [re.sub(r"(Model|For[A-Z]\w*)$", "", str(architectures[0])) + head]
        labels = [self.tensors[n].shape[0] for n in self._whole if re.search(r"(classifier|score)\.(\w+\.)?weight$", n)]
        if labels and len(_mapping(config.get("id2label"))) != labels[-1]:
            config["id2label"] = {str(k): f"LABEL_{k}" for k in range(labels[-1])}
            config["label2id"] = {f"LABEL_{k}": k for k in range(labels[-1])}
        return config

    def side_files(self) -> dict[str, Path]:
        """The adapter's side files over those of the base; the config is in ``config`` if the folder has none."""
        own = side_files(self.folder) if self.folder else {}
        base = {name: path for name, path in self._base.side_files().items() if name != "config.json"}
        return {**base, **own}

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor in memory of its own."""
        info = self.tensors[self.aliases.get(name, name)]
        out = torch.empty(info.numel, dtype=info.dtype)
        self.read_into(name, 0, out)
        return out.view(info.shape)

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Elements ``[start, start + out.numel())`` of the flattened tensor, added in float32, then converted."""
        name = self.aliases.get(name, name)
        info = self.tensors[name]
        check_request(info, start, out)
        if name not in self._factors:
            self._read_stored(name, start, out)
            return
        b, a, scaling = self._load(name)
        columns = a.shape[1]
        rows = max(1, _BLOCK // columns)
        wide = torch.float64 if out.dtype == torch.float64 else torch.float32
        stop = start + out.numel()
        for row in range(start // columns // rows * rows, -(-stop // columns), rows):
            low, high = max(start, row * columns), min(stop, (row + rows) * columns)
            if low >= high:
                continue
            part = out[low - start : high - start]
            total = part if out.dtype == wide else torch.empty(high - low, dtype=wide)
            self._read_stored(name, low, total)
            change = (b[row : row + rows] @ a).mul_(scaling).view(-1)
            total.add_(change[low - row * columns : high - row * columns])
            if total is not part:
                part.copy_(total)

    def weight_files(self) -> Sequence[TensorFile]:
        """None: tensors are made of the adapter and the base."""
        return ()

    def low_rank(self, name: str) -> LowRank | None:
        """``(B, A, scaling)``, float32, ``B`` [d_out, r], ``A`` [r, rest]: the change is ``scaling * B @ A``.

        None also for a tensor that the adapter stores whole beside its factors: it is not the base's with a change.
        """
        name = self.aliases.get(name, name)
        return self._load(name) if name in self._factors and name not in self._whole else None

    def _read_stored(self, name: str, start: int, out: torch.Tensor) -> None:
        if name in self._whole:
            self._adapter.read_into(self._whole[name], start, out)
        else:
            self._base.read_into(self._base_names[name], start, out)

    def _load(self, name: str) -> LowRank:
        """The factors as they multiply into the stored orientation; each thread keeps those it used last."""
        last: tuple[str, LowRank] | None = getattr(self._local, "last", None)
        if last is None or last[0] != name:
            factors = self._factors[name]
            a = self._adapter.read(factors.a).float().flatten(1)
            b = self._adapter.read(factors.b).float().flatten(1)
            if factors.transposed:
                a, b = b.T.contiguous(), a.T.contiguous()
            last = (name, (b, a, factors.scaling))
            self._local.last = last
        return last[1]


def _rename(name: str, prefix: Prefix) -> str:
    """A tensor's name in the adapter's model from its name in the base."""
    return prefix.expert + name.removeprefix(prefix.base) if name.startswith(prefix.base) else name


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {"0": "", "1": ""}
