"""Examples into model inputs: the tokenizer or image processor that lies beside a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retex_cli.errors import RetexError
from retex_cli.io.inputs import Example

Inputs = dict[str, Tensor]

IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")


class Processor:
    """Turns examples of one kind into batches, in the way that the folder's own files say; from any thread."""

    def __init__(self, folder: Path, name: str, *, max_length: int | None = None) -> None:
        self.name = name
        self._max_length = max_length
        self._tokenizer = None
        self._image_processor = None
        names = {path.name for path in folder.iterdir()}
        from transformers import AutoImageProcessor, AutoTokenizer

        if names & {"tokenizer.json", "tokenizer_config.json", "vocab.txt", "tokenizer.model"}:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._tokens(["a"])  # sets how to cut and pad, which no other thread may be encoding with
        elif names & set(IMAGE_FILES):
            self._image_processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)  # type: ignore[no-untyped-call]

    @property
    def max_length(self) -> int | None:
        """Tokens per text; None for models that read no text."""
        if self._tokenizer is None:
            return None
        return self._max_length or min(int(self._tokenizer.model_max_length), 512)

    @property
    def reads(self) -> str:
        """What may be given, in a word: "texts", "images" or "tensors", which every model takes."""
        if self._tokenizer is not None:
            return "texts"
        return "tensors" if self._image_processor is None else "images"

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text that tokens stand for. Only where ``reads`` is "texts"."""
        assert self._tokenizer is not None
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def __call__(self, examples: Sequence[Example]) -> Inputs:
        """One padded batch, on the CPU, of examples of one kind. RetexError names one that the model cannot read."""
        for example in examples:
            self._check(example, examples[0])
        first = examples[0]
        if first.tensors is not None:
            return _stacked(examples)
        if first.text is not None:
            return self._tokens([example.text or "" for example in examples])
        assert self._image_processor is not None
        return dict(self._image_processor([picture(example) for example in examples], return_tensors="pt"))

    def _tokens(self, texts: list[str]) -> Inputs:
        assert self._tokenizer is not None
        return dict(
            self._tokenizer(texts, truncation=True, padding=True, max_length=self.max_length, return_tensors="pt")
        )

    def _check(self, example: Example, first: Example) -> None:
        if kind(example) != kind(first):
            raise RetexError(
                f"{example.source}: {kind(example)} in a batch of {kind(first)}", "keep one kind of input per file"
            )
        if kind(example) not in (self.reads, "tensors"):
            given = "a text" if example.text is not None else "an image"
            raise RetexError(
                f"{example.source}: {given}, and {self.name} reads {self.reads}",
                f"give {self.reads}"
                if self.reads != "tensors"
                else "there is no tokenizer or image processor beside it: give ready model inputs as .safetensors",
            )


def kind(example: Example) -> str:
    """ "texts", "images" or "tensors"."""
    return "tensors" if example.tensors is not None else "texts" if example.text is not None else "images"


def picture(example: Example) -> NDArray[np.uint8]:
    """Uint8 [height, width, 3] of an image. RetexError where it is none."""
    if isinstance(example.image, np.ndarray):
        return example.image
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise RetexError(f"{example.source}: reading images needs pillow", "pip install 'retex-cli[image]'") from None
    try:
        with Image.open(str(example.image)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        known = isinstance(error, UnidentifiedImageError)
        reason = "of no known format" if known else f"{type(error).__name__}: {error}"
        raise RetexError(f"{example.source}: not a readable image: {reason}", "give a whole image file") from error


def _stacked(examples: Sequence[Example]) -> Inputs:
    rows = [example.tensors or {} for example in examples]
    stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return {name: value.float() if value.is_floating_point() else value for name, value in stacked.items()}


def batches(examples: Sequence[Example], size: int) -> list[list[int]]:
    """Indices in batches of at most ``size``, examples of like length together so that little is padded.

    What cannot be stacked, kinds of inputs and shapes of tensors, is kept apart.
    """
    groups: dict[object, list[int]] = {}
    for index in sorted(range(len(examples)), key=lambda i: (len(examples[i].text or ""), i)):
        groups.setdefault(_shape(examples[index]), []).append(index)
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]


def _shape(example: Example) -> object:
    if example.tensors is None:
        return kind(example)
    return tuple((name, tuple(value.shape), value.dtype) for name, value in sorted(example.tensors.items()))
