"""The tensors of a loaded module as places that other weights are copied into."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retex_cli.errors import RetexError
from retex_cli.models.names import saved_names

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Wanted:
    """A tensor that is to go into a module.

    ``names``: what the module may call it, the likeliest first. ``shapes``: its own, then others that its place may
    have; where the two differ in their first dimension, the rows that both have are what is meant. ``required``:
    whether a module without such a place is refused.
    """

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    required: bool


class Places:
    """The parameters and buffers of ``module``'s state dict, by name.

    Filling one leaves the parameter the same object: optimisers, hooks and tied weights keep what they hold.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.kind = type(module).__name__
        self._module = module
        self._own = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}

    def match(self, wanted: Sequence[Wanted]) -> list[Tensor | None]:
        """The place of each, None where there is none and none is required. Nothing is written.

        Where several are wanted in one memory, as in a module that ties what a file stores twice, only the one that
        the module names first has it. RetexError names the first required tensor without a place or with one of
        another shape, and any place on the meta device.
        """
        saved = {} if all(any(n in self._own for n in one.names) for one in wanted) else saved_names(self._module)
        names = [self._name(one, saved) for one in wanted]
        asked = {name for name in names if name is not None}
        first: dict[int, str] = {}
        for name, value in self._own.items():
            if name in asked:
                first.setdefault(value.data_ptr(), name)
        owners = set(first.values())
        return [self._own[name] if name in owners else None for name in names]

    def _name(self, wanted: Wanted, saved: Mapping[str, str]) -> str | None:
        name = next((own for name in wanted.names if (own := saved.get(name, name)) in self._own), None)
        place = None if name is None else self._own[name]
        if place is None or tuple(place.shape) not in wanted.shapes:
            if not wanted.required:
                return None
            here = "no place" if place is None else f"only a place of {list(place.shape)}"
            raise RetexError(
                f"tensor {wanted.names[0]!r} {list(wanted.shapes[0])} has {here} in {self.kind}",
                "give a model of the expert's class; head=False leaves out what is the task's own",
            )
        if place.is_meta:
            raise RetexError(f"{self.kind}: tensor {name!r} is on the meta device and holds nothing", "load it first")
        return name

    def variable(self, place: Tensor) -> Tensor:
        """The parameter or buffer itself whose memory a place that ``match`` gave is."""
        name = next(name for name, value in self._own.items() if value is place)
        found: Tensor = self._module.state_dict(keep_vars=True)[name]
        return found

    def left_over(self, filled: Iterable[Tensor]) -> list[str]:
        """Names of floating-point tensors that share no memory with a filled place; tied weights are one memory."""
        pointers = {place.data_ptr() for place in filled}
        return [
            name
            for name, value in self._own.items()
            if value.is_floating_point() and value.numel() and value.data_ptr() not in pointers
        ]


def lend(variable: Tensor, memory: Tensor) -> None:
    """Let a parameter or buffer be this memory from now on, which others may have as well, if it is of its kind.

    It stays the same object, and what is tied to it stays tied.
    """
    if (variable.shape, variable.dtype, variable.device) == (memory.shape, memory.dtype, memory.device):
        variable.data = memory


def fill(place: Tensor, at: int, value: Tensor) -> None:
    """Copy ``value``, the elements from ``at`` on of a flattened tensor, into a place that has as many columns: rounded
    to its type, brought to its device, only what both have.

    Whole rows, or part of one. A value that was made in the place's own memory is there already.
    """
    if place.is_contiguous():
        target = place.view(-1)[at : at + value.numel()]
        if target.data_ptr() != value.data_ptr():
            target.copy_(value[: target.numel()])
        return
    row, column = divmod(at, place[0].numel())
    if row < len(place) and value.numel() < place[0].numel():
        fill(place[row], column, value)
    elif row < len(place):
        rows = value.reshape(-1, *place.shape[1:])
        target = place[row : row + len(rows)]
        target.copy_(rows[: len(target)])
