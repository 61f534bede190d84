"""The tensors of a PEFT LoRA adapter file sorted by what they do, and the settings that decide how strongly.

LoRA, 2106.09685, section 4.1: W = W0 + (alpha / r) B A. rsLoRA, 2312.03732: alpha / sqrt(r).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from retex_cli.errors import RetexError
from retex_cli.io.tensors import TensorInfo

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(?:\.default)?(?:\.weight)?")

#: Settings under which a weight is not base + scaling B A, or under which the base itself was changed at the start.
_UNSUPPORTED = (
    "use_dora use_qalora use_bdlora lora_bias layer_replication trainable_token_indices target_parameters "
    "kasa_config arrow_config alora_invocation_tokens monteclora_config"
).split()
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Factors:
    """Names of the two factors of one weight in the adapter file, and how they make it.

    ``shape`` is that of the weight; ``transposed`` says that the weight is stored as in x out (Conv1D, embeddings), so
    that its change is the transpose of B A.
    """

    a: str
    b: str
    shape: tuple[int, ...]
    scaling: float
    transposed: bool


@dataclass(frozen=True)
class AdapterKeys:
    """What an adapter does: ``factors`` by weight name, ``whole`` tensors (weight name -> name in the file)."""

    factors: Mapping[str, Factors]
    whole: Mapping[str, str]


def check_settings(path: Path, settings: Mapping[str, object]) -> None:
    """RetexError unless the adapter is a plain LoRA one."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise RetexError(
            f"{path}: an adapter of the type {kind!r}; only LORA can be read", "merge it into its base first"
        )
    for key in _UNSUPPORTED:
        if settings.get(key):
            raise RetexError(
                f"{path}: uses {key}, which is not plain LoRA", "merge the adapter into its base with peft first"
            )
    start = settings.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise RetexError(
            f"{path}: init_lora_weights is {start!r}, which changes the base as well",
            "convert the adapter to plain LoRA with peft, or merge it into its base",
        )


def _pattern_value(settings: Mapping[str, object], key: str, module: str) -> float | None:
    """The value of the first pattern that matches the end of a module's path."""
    patterns = settings.get(key)
    if isinstance(patterns, dict):
        for pattern, value in patterns.items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return float(value)
    return None


def _scaling(path: Path, settings: Mapping[str, object], module: str, rank: int) -> float:
    alpha = _pattern_value(settings, "alpha_pattern", module)
    if alpha is None:
        stated = settings.get("lora_alpha")
        if not isinstance(stated, (int, float)):
            raise RetexError(f"{path}: lora_alpha is {stated!r}, not a number")
        alpha = float(stated)
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def sort_keys(
    path: Path, tensors: Mapping[str, TensorInfo], settings: Mapping[str, object], settings_path: Path
) -> AdapterKeys:
    """Pair the factors and find the tensors that were trained whole. RetexError names a tensor that is neither."""
    check_settings(settings_path, settings)
    found: dict[tuple[str, bool], dict[str, str]] = {}
    whole: dict[str, str] = {}
    for name in tensors:
        short = name.removeprefix("base_model.model.")
        match = _FACTOR.fullmatch(short)
        if match:
            found.setdefault((match["module"], bool(match["embedding"])), {})[match["factor"]] = name
        elif ".lora_" in short or ".token_adapter." in short:
            raise RetexError(
                f"{path}: tensor {name!r} is not of a plain LoRA adapter", "merge the adapter into its base first"
            )
        else:
            short = short.replace(".base_layer.", ".")
            whole[re.sub(r"\.(modules_to_save|original_module)(\.default)?\.", ".", short)] = name
    factors = {}
    for (module, embedding), pair in found.items():
        if set(pair) != {"A", "B"}:
            lost = "B" if "A" in pair else "A"
            raise RetexError(f"{path}: {module!r} has no lora_{lost} beside {next(iter(pair.values()))!r}")
        transposed = embedding or bool(settings.get("fan_in_fan_out"))
        factors[f"{module}.weight"] = _factors(
            path, tensors[pair["A"]], tensors[pair["B"]], transposed, module, settings
        )
    return AdapterKeys(factors, whole)


def _factors(
    path: Path, a: TensorInfo, b: TensorInfo, transposed: bool, module: str, settings: Mapping[str, object]
) -> Factors:
    rank = a.shape[0] if a.shape else 0
    if len(a.shape) < 2 or len(b.shape) < 2 or b.shape[1] != rank or rank == 0 or math.prod(b.shape[2:]) != 1:
        raise RetexError(
            f"{path}: the factors of {module!r} do not fit: {a.name!r} {list(a.shape)}, {b.name!r} {list(b.shape)}"
        )
    shape = (b.shape[0], *a.shape[1:])
    if transposed and len(shape) == 2:
        shape = (shape[1], shape[0])
    return Factors(a.name, b.name, shape, _scaling(path, settings, module, rank), transposed and len(shape) == 2)
