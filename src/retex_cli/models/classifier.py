"""A model that answers with one label per input, and whose weights can be exchanged in place."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from retex_cli.errors import RetexError
from retex_cli.io.inputs import Example
from retex_cli.models.device import inference
from retex_cli.models.processor import Processor, batches
from retex_cli.parallel import ordered_map
from retex_cli.progress import Progress


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Loading into a fresh model is the plan here, not something to warn about."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def build_model(folder: Path) -> torch.nn.Module:
    """The module that ``config.json`` in ``folder`` names, with weights yet to come. RetexError where it names none."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    for name in config.architectures or ():
        if (architecture := getattr(transformers, name, None)) is not None:
            with quiet_transformers(), torch.device("cpu"):
                model: torch.nn.Module = architecture(config)
            return model.eval()
    raise RetexError(
        f"{folder / 'config.json'}: 'architectures' names no class of transformers: {config.architectures}",
        "export the expert with save_pretrained",
    )


def load_weights(model: torch.nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy ``tensors`` into the model; parameters may be missing only where they are tied to one that is there.

    RetexError names the first tensor without a place, or the first parameter without a tensor.
    """
    tied = getattr(model, "_tied_weights_keys", None) or ()
    result = model.load_state_dict(dict(tensors), strict=False)
    lost = [name for name in result.unexpected_keys if tensors[name].is_floating_point()]
    if lost:  # integers are buffers of other versions of the model, position ids say
        raise RetexError(f"{source}: tensor {lost[0]!r} has no place in {type(model).__name__}")
    parameters = {name for name, _ in model.named_parameters()}
    lost = [name for name in result.missing_keys if name in parameters and name not in tied]
    if lost:
        raise RetexError(f"{source}: {type(model).__name__} needs the tensor {lost[0]!r}, which is not there")
    tie = getattr(model, "tie_weights", None)
    if tied and tie is not None:
        tie()


def label_names(config: Mapping[str, object]) -> tuple[str, ...]:
    """The classes of a ``config.json`` in the order of the logits; transformers' own two where it names none."""
    names = config.get("id2label")
    if not isinstance(names, Mapping):
        return ("LABEL_0", "LABEL_1")
    return tuple(str(names[i]) for i in sorted(names, key=int))


class Classifier:
    """One task's model: built from the side files in ``folder``, filled by ``load``."""

    def __init__(self, folder: Path, device: torch.device, threads: int) -> None:
        self._model = build_model(folder).to(device)
        self._processor = Processor(folder)
        self._device = device
        self._threads = threads
        self.labels = label_names(json.loads((folder / "config.json").read_text()))

    def load(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Take these weights; see ``load_weights``."""
        load_weights(self._model, tensors, source)

    def logits(self, examples: Sequence[Example], batch_size: int, progress: Progress) -> Tensor:
        """Float32 [n, classes] on the CPU, in the order of ``examples``. Advances progress by one an example."""
        result = torch.empty(len(examples), len(self.labels))

        def forward(batch: list[int]) -> Tensor:
            inputs = self._processor([examples[i] for i in batch])
            with inference(self._device):
                logits: Tensor = self._model(**{name: value.to(self._device) for name, value in inputs.items()}).logits
            return logits.float().cpu()

        plan = batches(examples, batch_size)
        for batch, logits in zip(plan, ordered_map(forward, plan, self._threads), strict=True):
            result[batch] = logits
            progress.advance(len(batch))
        return result
