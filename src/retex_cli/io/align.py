"""Which tensors of an expert are merged with which of the base, and which are the task's own. From headers alone,
apart from integer buffers, whose values decide.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from retex_cli.errors import RetexError
from retex_cli.io.checkpoint import Checkpoint, TensorInfo
from retex_cli.io.dtypes import type_name
from retex_cli.io.naming import canonical, find_prefix, is_buffer, is_output_module, is_vocabulary, strip


@dataclass(frozen=True)
class Alignment:
    """How the tensors of one expert relate to those of the base; every tensor of both is in exactly one place.

    ``shared``: base name -> expert name, merged. ``rows``: base name -> leading rows in common, for shared tensors of
    which the expert has more rows; the rows behind them are the task's. ``task``: expert names that are the task's as
    a whole. ``kept``: base names without a counterpart, copied from the base. ``prefix``: what was removed from the
    base's and the expert's names to match them.
    """

    shared: dict[str, str]
    rows: dict[str, int]
    task: tuple[str, ...]
    kept: tuple[str, ...]
    prefix: tuple[str, str]


def align(base: Checkpoint, expert: Checkpoint, *, allow_missing: Collection[str] = ()) -> Alignment:
    """Match an expert with its base. ``allow_missing``: globs of base parameters that the expert may lack.

    RetexError names tensor, file and both values for a base parameter that is missing, for fewer rows than the base's
    vocabulary has, and for any other difference of shape.
    """
    prefix = find_prefix(_shapes(base), _shapes(expert), expert.reference)
    names = _Names(base, expert, prefix)
    shared: dict[str, str] = {}
    rows: dict[str, int] = {}
    kept: list[str] = []
    missing: list[str] = []
    integers: list[tuple[str, str]] = []
    for name, info in base.tensors.items():
        counterpart = names.find(name)
        if counterpart is None:
            if is_buffer(name, info.shape, info.dtype.is_floating_point) or _matches(name, allow_missing):
                kept.append(name)
            else:
                missing.append(name)
            continue
        verdict = _compare(base, expert, name, counterpart)
        if verdict == "integer":
            integers.append((name, counterpart))
        elif verdict == "task":
            kept.append(name)
        else:
            shared[name] = counterpart
            if verdict == "rows":
                rows[name] = info.shape[0]
    if missing:
        shared.update(_tied_or_refuse(base, expert, shared, missing))
    for name, counterpart in integers:  # last: these alone need data, which may have to be downloaded
        if _equal_values(base, name, expert, counterpart):
            shared[name] = counterpart
        else:
            kept.append(name)
    order = {name: k for k, name in enumerate(base.tensors)}
    used = set(shared.values())
    return Alignment(
        shared={name: shared[name] for name in sorted(shared, key=order.__getitem__)},
        rows=rows,
        task=tuple(name for name in expert.tensors if name not in used),
        kept=tuple(sorted(kept, key=order.__getitem__)),
        prefix=(prefix.base, prefix.expert),
    )


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in checkpoint.tensors.items()}


class _Names:
    """Looks up an expert's name for a base name: the name itself under the prefix, or a name that is tied to it."""

    def __init__(self, base: Checkpoint, expert: Checkpoint, prefix: tuple[str, str]) -> None:
        self._prefix = prefix
        self._by_short: dict[str, str] = {}
        for name in (*expert.tensors, *expert.aliases):
            short = strip(name, prefix[1])
            if short not in self._by_short or name.startswith(prefix[1]):
                self._by_short[short] = expert.aliases.get(name, name)
        self._ties: dict[str, list[str]] = {}
        for dropped, kept in base.aliases.items():
            self._ties.setdefault(kept, []).append(dropped)

    def find(self, name: str) -> str | None:
        for candidate in (name, *self._ties.get(name, ())):
            found = self._by_short.get(strip(candidate, self._prefix[0]))
            if found is not None:
                return found
        return None


def _matches(name: str, globs: Collection[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def _compare(base: Checkpoint, expert: Checkpoint, name: str, counterpart: str) -> str:
    """``shared``, ``rows`` (more rows than the base), ``task`` (the expert's own) or ``integer`` (values decide)."""
    ours, theirs = base.tensors[name], expert.tensors[counterpart]
    floating = ours.dtype.is_floating_point, theirs.dtype.is_floating_point
    if ours.shape == theirs.shape:
        if all(floating):
            return "shared"
        if not any(floating):
            return "integer"
    if not all(floating):
        if is_buffer(name, ours.shape, floating[0]) and is_buffer(counterpart, theirs.shape, floating[1]):
            return "task"
        raise RetexError(
            f"{theirs.file}: tensor {counterpart!r} is {_words(theirs)}, in the base {ours.file} it is {_words(ours)}",
            "dequantise the expert first" if floating[0] else "give the experts' own base",
        )
    if ours.shape[1:] == theirs.shape[1:] and ours.shape and _is_vocabulary(base, expert, name, ours, theirs):
        if theirs.shape[0] < ours.shape[0]:
            raise RetexError(
                f"{theirs.file}: tensor {counterpart!r} has {theirs.shape[0]} vocabulary rows, fewer than the "
                f"{ours.shape[0]} of {name!r} in the base {ours.file}",
                "give the base whose tokenizer the expert uses",
            )
        return "rows"
    if _is_output(base, expert, name, counterpart):
        return "task"
    raise RetexError(
        f"{theirs.file}: tensor {counterpart!r} has the shape {list(theirs.shape)}, "
        f"in the base {ours.file} {name!r} has {list(ours.shape)}",
        "the expert was tuned from another base or architecture: give its own base",
    )


def _words(info: TensorInfo) -> str:
    return f"{type_name(info.dtype)} {list(info.shape)}"


def _is_vocabulary(base: Checkpoint, expert: Checkpoint, name: str, ours: TensorInfo, theirs: TensorInfo) -> bool:
    sizes = _config_int(base.config, "vocab_size"), _config_int(expert.config, "vocab_size")
    by_config = sizes[0] != sizes[1] and sizes == (ours.shape[0], theirs.shape[0])
    return is_vocabulary(name) or (by_config and not is_output_module(name))


def _is_output(base: Checkpoint, expert: Checkpoint, name: str, counterpart: str) -> bool:
    if is_output_module(name) or is_output_module(counterpart):
        return True
    ours, theirs = base.tensors[name].shape, expert.tensors[counterpart].shape
    labels = num_labels(base.config), num_labels(expert.config)
    by_config = None not in labels and labels[0] != labels[1] and (ours[:1], theirs[:1]) == ((labels[0],), (labels[1],))
    return by_config and ours[1:] == theirs[1:] and "embedding" not in name


def _config_int(config: Mapping[str, object] | None, key: str) -> int | None:
    """An integer of the config, also of the text part of a multimodal one."""
    for part in (config, (config or {}).get("text_config")):
        if isinstance(part, Mapping) and isinstance(value := part.get(key), int):
            return value
    return None


def num_labels(config: Mapping[str, object] | None) -> int | None:
    """How many labels a config speaks of; 2 where it names none, as transformers assumes. None without a config."""
    if config is None:
        return None
    labels = config.get("id2label")
    if isinstance(labels, Mapping):
        return len(labels)
    return _config_int(config, "num_labels") or 2


def _tied_or_refuse(
    base: Checkpoint, expert: Checkpoint, shared: Mapping[str, str], missing: list[str]
) -> dict[str, str]:
    """Missing base parameters that are copies of a shared one in the base are the expert's tied weights; else refuse.

    The base of a tied model may store both copies while the expert stores one.
    """
    found: dict[str, str] = {}
    lost: list[str] = []
    tied = expert.config is not None and expert.config.get("tie_word_embeddings") is not False
    for name in missing:
        info = base.tensors[name]
        twins = [
            other
            for other in shared
            if tied and is_vocabulary(name) and is_vocabulary(other) and base.tensors[other].shape == info.shape
            and base.tensors[other].dtype == info.dtype and torch.equal(base.read(other), base.read(name))
        ]  # fmt: skip
        if twins:
            found[name] = shared[twins[0]]
        else:
            lost.append(name)
    if lost:
        raise _missing(base, expert, shared, lost)
    return found


def _missing(base: Checkpoint, expert: Checkpoint, shared: Mapping[str, str], lost: list[str]) -> RetexError:
    where = expert.files[0] if len(expert.files) == 1 else expert.reference
    if not shared:
        ours, theirs = next(iter(base.tensors), "nothing"), next(iter(expert.tensors), "nothing")
        return RetexError(
            f"{where}: shares no tensor with the base {base.reference} ({theirs!r} here, {ours!r} there)",
            "base and expert are of different architectures",
        )
    glob = lost[0].partition(".")[0] + ".*" if len(lost) > 1 and "." in lost[0] else lost[0]
    if not all(fnmatch.fnmatchcase(name, glob) for name in lost) or any(fnmatch.fnmatchcase(n, glob) for n in shared):
        glob = lost[0]
    more = f" and {len(lost) - 1} more of the base's parameters" if len(lost) > 1 else ""
    return RetexError(
        f"{where}: tensor {lost[0]!r}{more} is missing; the base {base.tensors[lost[0]].file} has it with the shape "
        f"{list(base.tensors[lost[0]].shape)}",
        f"if the expert may do without: --allow-missing {glob!r}",
    )


def _equal_values(base: Checkpoint, name: str, expert: Checkpoint, counterpart: str) -> bool:
    ours, theirs = base.read(name), expert.read(counterpart)
    return ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def expert_name(alignment: Alignment, name: str) -> str:
    """What a tensor of the base is called in the expert's own model; kept tensors get the expert's prefix."""
    if name in alignment.shared:
        return alignment.shared[name]
    return alignment.prefix[1] + canonical(name.removeprefix(alignment.prefix[0]))
