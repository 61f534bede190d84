"""Examples into model inputs: the tokenizer or image processor that lies beside a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from retex_cli.errors import RetexError
from retex_cli.io.inputs import Example

Inputs = dict[str, Tensor]

IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")


class Processor:
    """Turns examples of one kind into batches, in the way that the folder's own files say."""

    def __init__(self, folder: Path, name: str, *, max_length: int | None = None) -> None:
        self.name = name
        self._max_length = max_length
        self._tokenizer = None
        self._image_processor = None
        names = {path.name for path in folder.iterdir()}
        from transformers import AutoImageProcessor, AutoTokenizer

        if names & {"tokenizer.json", "tokenizer_config.json", "vocab.txt", "tokenizer.model"}:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        elif names & set(IMAGE_FILES):
            self._image_processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)  # type: ignore[no-untyped-call]

    @property
    def max_length(self) -> int | None:
        """Tokens per text; None for models that read no text."""
        if self._tokenizer is None:
            return None
        return self._max_length or min(int(self._tokenizer.model_max_length), 512)

    def __call__(self, examples: Sequence[Example]) -> Inputs:
        """One padded batch, on the CPU. RetexError names an example of the wrong kind."""
        first = examples[0]
        if first.tensors is not None:
            stacked = {name: torch.stack([_tensors(example)[name] for example in examples]) for name in first.tensors}
            return {name: value.float() if value.is_floating_point() else value for name, value in stacked.items()}
        if first.text is not None:
            if self._tokenizer is None:
                raise RetexError(f"{self.name}: text given to a model without a tokenizer", "give it its own inputs")
            encoded = self._tokenizer(
                [_text(example) for example in examples],
                truncation=True,
                padding=True,
                max_length=self.max_length,
                return_tensors="pt",
            )
            return dict(encoded)
        if self._image_processor is None:
            raise RetexError(
                f"{self.name}: images given to a model without an image processor", "give it its own inputs"
            )
        from PIL import Image

        images = [Image.open(_image(example)).convert("RGB") for example in examples]
        return dict(self._image_processor(images, return_tensors="pt"))


def _text(example: Example) -> str:
    if example.text is None:
        raise RetexError(f"{example.source}: not a text, in a batch of texts", "keep one kind of input per file")
    return example.text


def _image(example: Example) -> Path:
    if example.image is None:
        raise RetexError(f"{example.source}: not an image, in a batch of images", "keep one kind of input per file")
    return example.image


def _tensors(example: Example) -> dict[str, Tensor]:
    if example.tensors is None:
        raise RetexError(f"{example.source}: not model inputs, in a batch of them", "keep one kind of input per file")
    return dict(example.tensors)


def batches(examples: Sequence[Example], size: int) -> list[list[int]]:
    """Indices in batches of at most ``size``, examples of like length together so that little is padded."""
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i].text or ""), i))
    return [order[start : start + size] for start in range(0, len(order), size)]
