"""A model folder from the outside: which files hold its weights, which files travel with it, what its config says."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from retex_cli.errors import RetexError

Kind = Literal["safetensors", "torch", "adapter"]

#: What a tokenizer, processor or pipeline needs besides the weights. Everything else stays behind: training
#: leftovers (optimizer, scheduler, trainer state, logs), other frameworks' weights, the model card of another model.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "vocab.bpe",
    "merges.txt",
    "bpe.codes",
    "dict.txt",
    "*.tiktoken",
    "*.spm",
    "tokenizer.model*",
    "spiece.model",
    "sentencepiece.bpe.model",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor_config.json",
    "audio_tokenizer_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "[0-9]_*/config.json",
    "configuration_*.py",
    "modeling_*.py",
    "tokenization_*.py",
    "processing_*.py",
    "image_processing_*.py",
)


class Weights(NamedTuple):
    """Where a folder keeps its weights: the files in order, or the index that lists them."""

    kind: Kind
    file: str
    indexed: bool


def find_weights(place: object, names: set[str]) -> Weights:
    """The weights among a folder's file names, in the order in which transformers looks for them.

    RetexError, naming ``place``, when there are none or when the choice would be a guess.
    """
    adapter = "adapter_config.json" in names and bool(names & {"adapter_model.safetensors", "adapter_model.bin"})
    full: Weights | None = None
    for kind, file, indexed in (
        ("safetensors", "model.safetensors", False),
        ("safetensors", "model.safetensors.index.json", True),
        ("torch", "pytorch_model.bin", False),
        ("torch", "pytorch_model.bin.index.json", True),
    ):
        if file in names:
            full = Weights("safetensors" if kind == "safetensors" else "torch", file, indexed)
            break
    if adapter and full:
        raise RetexError(
            f"{place}: holds both a model ({full.file}) and an adapter (adapter_config.json)",
            "name the file that is meant, or move one of them away",
        )
    if adapter:
        return Weights(
            "adapter", next(n for n in ("adapter_model.safetensors", "adapter_model.bin") if n in names), False
        )
    return full or _only_other(place, names)


def _only_other(place: object, names: set[str]) -> Weights:
    """A single safetensors file or index of any other name."""
    indexes = sorted(n for n in names if n.endswith(".safetensors.index.json"))
    singles = sorted(n for n in names if n.endswith(".safetensors"))
    if len(indexes) == 1:
        return Weights("safetensors", indexes[0], True)
    if len(singles) == 1 and not indexes:
        return Weights("safetensors", singles[0], False)
    if singles:
        shown = ", ".join((indexes or singles)[:4])
        raise RetexError(f"{place}: several weight files, none called model.safetensors: {shown}", "name one of them")
    raise RetexError(
        f"{place}: no weights in this folder",
        "a model folder has model.safetensors, model.safetensors.index.json or pytorch_model.bin",
    )


def refuse_adapter(reference: object, weights: Weights) -> None:
    """RetexError for an adapter where a whole model is asked for."""
    if weights.kind == "adapter":
        raise RetexError(
            f"{reference}: a LoRA adapter ({weights.file}) is not a model by itself",
            "give it as an expert, beside the base it was tuned on",
        )


def read_index(path: Path) -> dict[str, str]:
    """The weight map of a shard index: tensor name -> file name beside the index. RetexError if it is damaged."""
    parsed = read_json(path)
    mapping = parsed.get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise RetexError(f"{path}: damaged index: it has no weight_map", "download or export the model again")
    for name, file in mapping.items():
        if not isinstance(file, str) or PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise RetexError(f"{path}: damaged index: tensor {name!r} is said to be in {file!r}")
    return mapping


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file; RetexError names the file and the place of the mistake."""
    try:
        parsed = json.loads(path.read_bytes())
    except OSError as error:
        raise RetexError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RetexError(f"{path}: not valid JSON: {error}", "download or export the model again") from None
    if not isinstance(parsed, dict):
        raise RetexError(f"{path}: not a JSON object")
    return parsed


def is_side_file(name: str) -> bool:
    """Whether a file of this name (relative, with ``/``) travels with the weights."""
    depth = name.count("/")
    return any(pattern.count("/") == depth and fnmatch.fnmatchcase(name, pattern) for pattern in SIDE_FILES)


def side_files(folder: Path) -> dict[str, Path]:
    """The files of a folder that travel with its weights, by relative name, sorted."""
    entries = [path for depth in ("*", "*/*") for path in folder.glob(depth) if path.is_file()]
    named = {path.relative_to(folder).as_posix(): path for path in entries}
    return {name: named[name] for name in sorted(named) if is_side_file(name)}
