"""The network of a model folder: built, its weights exchanged in place, its inputs prepared, its answers read.

transformers builds what the folder's ``config.json`` names; any other network is built by a function of the user's,
named as ``package.module:function``.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from retex_cli.errors import RetexError, UsageError
from retex_cli.io.inputs import Example
from retex_cli.models.device import has_fast_bf16
from retex_cli.models.names import passed_over, saved_names
from retex_cli.models.processor import Inputs, Processor


class Network:
    """The module that belongs to a folder with a ``config.json``, in eval mode on ``device``; ``load`` fills it.

    ``model`` names the function that builds it, called with the parsed ``config.json``; None leaves it to
    transformers. ``max_length`` cuts texts, in tokens. ``name`` is what errors call it, the folder if None. UsageError
    where ``model`` gives no module, RetexError where transformers knows none.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        *,
        model: str | None = None,
        max_length: int | None = None,
        name: str | None = None,
    ) -> None:
        self.name = name or str(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.config: Mapping[str, object] = config
        built = _from_transformers(folder, self.name) if model is None else _from_function(model, config, self.name)
        self.device = device
        self.gives_hidden_states = model is None
        self.labels = label_names(config)
        self.module = built.to(device).eval()
        self._own = frozenset(self.module.state_dict())
        self._processor = Processor(folder, self.name, max_length=max_length)
        _forget_imports(type(self.module).__qualname__)

    @classmethod
    def of(
        cls,
        files: Mapping[str, Path | bytes],
        name: str,
        device: torch.device,
        *,
        model: str | None = None,
        max_length: int | None = None,
    ) -> Self:
        """The network of side ``files``, by relative path: where they lie, or what they hold.

        RetexError, in the words of ``name``, where there is no config among them.
        """
        if "config.json" not in files:
            raise RetexError(
                f"{name}: no config.json beside the weights, so no network can be built",
                "give a model folder, not a bare weight file; retex merge -o merged/ writes one",
            )
        with tempfile.TemporaryDirectory() as folder:  # only building reads it
            for file, content in files.items():
                place = Path(folder) / file
                place.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, bytes):
                    place.write_bytes(content)
                else:
                    place.symlink_to(content.resolve())
            return cls(Path(folder), device, model=model, max_length=max_length, name=name)

    @property
    def max_length(self) -> int | None:
        """Tokens per text; None for networks that read no text."""
        return self._processor.max_length

    @property
    def reads(self) -> str:
        """ "texts", "images" or "tensors": what there is a tokenizer or an image processor for."""
        return self._processor.reads

    @functools.cached_property
    def fast_bf16(self) -> bool:
        """Whether matrix products are taken in bfloat16: where that is the fast way and norms other than BatchNorm are.

        BatchNorm takes away means that may be many deviations large, of which bfloat16 leaves three digits: answers of
        an EfficientNet move by as much as its offsets leave out. Where nothing takes means away, they hide in the same
        way what little there is to see in the sky of a photograph.
        """
        steady = normalises(self.module) and not any(isinstance(layer, _BatchNorm) for layer in self.module.modules())
        return steady and has_fast_bf16(self.device)

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """No gradients; matrix products in bfloat16 where ``fast_bf16``, everything else in float32."""
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.fast_bf16):
            yield

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text that tokens stand for. Only where ``reads`` is "texts"."""
        return self._processor.text_of(tokens)

    def load(self, tensors: Iterable[tuple[str, Tensor]], source: str) -> None:
        """Take these weights, named as files or as the module name them; see ``load_weights``."""
        load_weights(self.module, ((self.own_name(name), value) for name, value in tensors), source)

    def own_name(self, name: str) -> str:
        """What the module calls a tensor that is named as files or as the module name it."""
        return name if name in self._own else self._saved.get(name, name)

    @functools.cached_property
    def _saved(self) -> dict[str, str]:
        return saved_names(self.module)

    def inputs(self, examples: Sequence[Example]) -> Inputs:
        """One padded batch on the network's device, by the names of ``forward``'s arguments."""
        return {name: value.to(self.device) for name, value in self._processor(examples).items()}

    def logits(self, inputs: Inputs) -> Tensor:
        """Float32 [n, classes] on the network's device. Gradients and precision are the caller's to decide.

        RetexError where the network returns neither such a tensor nor an object with such ``logits``.
        """
        output = self.module(**inputs)
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise RetexError(
                f"{self.name}: {type(self.module).__name__} returns no logits [inputs, classes] but {found}",
                "the network returns a tensor of logits, or an object with `logits`",
            )
        return logits.float()


def normalises(module: nn.Module) -> bool:
    """Whether any layer brings what it reads to a scale of its own, so that errors before it do not grow."""
    return any("Norm" in type(part).__name__ for part in module.modules())


def label_names(config: Mapping[str, object]) -> tuple[str, ...]:
    """The classes of a ``config.json`` in the order of the logits; transformers' own two where it names none."""
    names = config.get("id2label")
    if not isinstance(names, Mapping):
        return ("LABEL_0", "LABEL_1")
    return tuple(str(names[i]) for i in sorted(names, key=int))


def load_weights(module: torch.nn.Module, tensors: Iterable[tuple[str, Tensor]], source: str) -> None:
    """Copy ``tensors`` into the module, one at a time, so that no second copy of all is in memory; only integer buffers
    and what shares memory with a given tensor may be missing.

    A running mean left at its initial value gives wrong answers without a word, so floating buffers count as parameters
    do. RetexError names the first tensor without a place, of another shape, or missing; others are in the module then.
    """
    own, kind, given = module.state_dict(), type(module).__name__, set()
    for name, tensor in tensors:
        if name in own:
            if own[name].shape != tensor.shape:
                ours, theirs = list(own[name].shape), list(tensor.shape)
                raise RetexError(f"{source}: {name!r} is {theirs}, {kind} has it as {ours}")
            own[name].copy_(tensor)
            given.add(name)
        elif tensor.is_floating_point() and not passed_over(module, name):  # integers are buffers, position ids say
            raise RetexError(f"{source}: tensor {name!r} has no place in {kind}")
    filled = {own[name].data_ptr() for name in given}  # tied weights are one memory
    for name, value in own.items():
        if name not in given and value.is_floating_point() and value.data_ptr() not in filled:
            raise RetexError(f"{source}: {kind} needs the tensor {name!r}, which is not there")


@functools.cache
def _forget_imports(kind: str) -> None:
    """The first network of a kind is imported while it is built, and errors that this raised and caught hold on to all
    that called it, the network and whatever is fitted to it, until they are looked for."""
    del kind
    gc.collect()


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Loading into a fresh model is the plan here, not something to warn about."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _from_transformers(folder: Path, name: str) -> torch.nn.Module:
    import transformers

    file, hint = f"{name}: config.json", 'name a function that builds it: model = "module:function" under [model]'
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except ValueError as error:
        raise RetexError(f"{file}: not the config of a transformers model", hint) from error
    for kind in config.architectures or ():
        if (architecture := getattr(transformers, kind, None)) is not None:
            with _quiet_transformers(), torch.device("cpu"):
                module: torch.nn.Module = architecture(config)
            return module
    raise RetexError(f"{file}: 'architectures' names no class of transformers: {config.architectures}", hint)


def _from_function(model: str, config: Mapping[str, object], name: str) -> torch.nn.Module:
    try:
        module = _function(model)(config)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"model {model!r} fails for the config.json of {name}: {type(error).__name__}: {error}",
            "it is called with the parsed config.json; --debug shows the traceback",
        ) from error
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"model {model!r} returns {type(module).__name__}, not a torch.nn.Module")
    return module


def _function(model: str) -> Callable[[Mapping[str, object]], object]:
    """What ``package.module:function`` names. UsageError says which part of it is not there."""
    place, _, name = model.partition(":")
    if not place or not name:
        raise UsageError(f"model {model!r} names no function", 'write it as "package.module:function"')
    try:
        module = importlib.import_module(place)
    except Exception as error:
        hint = f"{place.replace('.', '/')}.py beside retex.toml, or in an installed package"
        raise UsageError(f"model {model!r}: cannot import {place}: {type(error).__name__}: {error}", hint) from error
    function: Callable[[Mapping[str, object]], object] | None = getattr(module, name, None)
    if function is None or not callable(function):
        found = "is not a function" if function is not None else "is not there"
        raise UsageError(f"model {model!r}: {name} {found} in {module.__file__ or place}")
    return function
