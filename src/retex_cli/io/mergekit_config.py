"""mergekit's YAML files: read and checked key by key. A key that is unknown or cannot be honoured is an error.

Only the form is known here; what a parameter means for a merge is decided in ``commands/merge_config.py``. The form is
that of mergekit 0.1.5 (https://github.com/arcee-ai/mergekit).
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import yaml

from retex_cli.errors import RetexError

Scalar = bool | int | float | str


@dataclass(frozen=True)
class Condition:
    """``values`` for the tensors whose name contains ``filter``: one value, or several spread evenly over the depth."""

    filter: str | None
    values: tuple[Scalar, ...]


Setting = tuple[Condition, ...]
"""What one parameter is: the first condition that matches a tensor counts."""
Parameters = Mapping[str, Setting]


@dataclass(frozen=True)
class Reference:
    """A model, and an adapter that is applied to it."""

    model: str
    lora: str | None = None


@dataclass(frozen=True)
class Input:
    """One entry of ``models``, or one source of the slice. ``place`` names it in messages."""

    reference: Reference
    place: str
    parameters: Parameters = field(default_factory=dict)
    layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class MergekitConfig:
    """One file. ``scopes`` are the parameters of the slice and of the whole file, by place, the nearer first."""

    file: Path
    sha256: str
    method: str
    base: Reference | None
    inputs: tuple[Input, ...]
    scopes: Mapping[str, Parameters]
    dtype: str | None
    out_dtype: str | None
    tokenizer: str | None

    def fail(self, place: str, problem: str, hint: str) -> NoReturn:
        """Raise ``RetexError`` that names the file and the key."""
        raise RetexError(f"{self.file}: {place} {problem}", hint)


def closest(name: str, known: Collection[str]) -> str:
    """A hint with the closest of ``known``, or all of them."""
    near = difflib.get_close_matches(name, sorted(known), n=2, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"known here: {', '.join(sorted(known))}"


def read_mergekit(path: Path) -> MergekitConfig:
    """Read and check one file. ``RetexError`` names file, key and the next step."""
    try:
        data = path.read_bytes()
        found = yaml.load(data, _Loader)
    except OSError as error:
        raise RetexError(f"{path}: {error.strerror or error}", "--config takes mergekit's YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RetexError(f"{path}: {' '.join(str(error).split())}", "it must be one YAML document") from error
    return _Reader(path, hashlib.sha256(data).hexdigest()).config(found)


class _Loader(yaml.SafeLoader):
    """YAML whose mappings may not name a key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return dict(super().construct_mapping(node, deep))


_TOP = (
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype",
    "tokenizer_source", "tokenizer", "chat_template",
)  # fmt: skip


class _Reader:
    """Turns a parsed file into a MergekitConfig."""

    def __init__(self, file: Path, sha256: str) -> None:
        self.file, self.sha256 = file, sha256

    def config(self, found: object) -> MergekitConfig:
        data = self._mapping(found, "the file", _TOP)
        self._refuse_foreign(data)
        base = None if data.get("base_model") is None else self._reference(data["base_model"], "base_model")
        inputs, own = self._inputs(data, base)
        seen: dict[Reference, str] = {}
        for entry in inputs:
            if entry.reference in seen:
                self._fail(entry.place, f"is the model of {seen[entry.reference]} again", "name every model once")
            seen[entry.reference] = entry.place
        return MergekitConfig(
            file=self.file,
            sha256=self.sha256,
            method=self._text(data, "merge_method") or self._fail("merge_method", "is missing", "name the method"),
            base=base,
            inputs=inputs,
            scopes={**own, "parameters": self._parameters(data.get("parameters"), "parameters")},
            dtype=self._text(data, "dtype"),
            out_dtype=self._text(data, "out_dtype"),
            tokenizer=self._tokenizer(data, base),
        )

    def _refuse_foreign(self, data: Mapping[str, object]) -> None:
        given = [key for key in ("models", "slices", "modules") if data.get(key)]
        if len(given) != 1:
            self._fail(
                " and ".join(given) or "models", "cannot stand together" if given else "is missing", "give models alone"
            )
        if given == ["modules"]:
            self._fail("modules", "is not supported", "give models: every tensor of the base is merged by its name")
        if data.get("chat_template") is not None:
            self._fail("chat_template", "is not applied", "remove it: the base's chat template is copied")

    def _inputs(
        self, data: Mapping[str, object], base: Reference | None
    ) -> tuple[tuple[Input, ...], dict[str, Parameters]]:
        if data.get("models"):
            models = self._list(data["models"], "models")
            return tuple(self._input(entry, f"models[{i}]", ()) for i, entry in enumerate(models)), {}
        slices = self._list(data["slices"], "slices")
        if len(slices) != 1:
            hint = "retex merges models of one shape, layer by layer: give one slice over all layers, or models"
            self._fail("slices", f"has {len(slices)} entries", hint)
        keys = ("sources", "parameters", "base_model", "residual_weight")
        only = self._mapping(slices[0], "slices[0]", keys)
        if only.get("residual_weight") is not None:
            self._fail("slices[0].residual_weight", "is not supported", "remove it")
        if only.get("base_model") is not None and self._reference(only["base_model"], "slices[0].base_model") != base:
            self._fail("slices[0].base_model", "is not the base_model of the file", "give base_model at the top alone")
        sources = self._list(only.get("sources"), "slices[0].sources")
        inputs = [self._input(s, f"slices[0].sources[{i}]", ("layer_range",)) for i, s in enumerate(sources)]
        own = {"slices[0].parameters": self._parameters(only.get("parameters"), "slices[0].parameters")}
        return tuple(inputs), own

    def _input(self, found: object, place: str, more: tuple[str, ...]) -> Input:
        entry = self._mapping(found, place, ("model", "parameters", *more))
        if entry.get("model") is None:
            self._fail(f"{place}.model", "is missing", "name a folder, a file or a hub id")
        layers = None
        if more:
            ends = entry.get("layer_range")
            if not (isinstance(ends, list) and len(ends) == 2 and all(type(end) is int for end in ends)):
                self._fail(f"{place}.layer_range", f"is {ends!r}", "it is [0, number of layers]")
            layers = (ends[0], ends[1])
        reference = self._reference(entry["model"], f"{place}.model")
        return Input(reference, place, self._parameters(entry.get("parameters"), f"{place}.parameters"), layers)

    def _reference(self, found: object, place: str) -> Reference:
        """``path``, ``org/name@revision``, ``model+adapter``, or mappings of the same, found beside the file too."""
        if isinstance(found, dict):
            entry = self._mapping(found, place, ("model", "lora", "override_architecture"))
            if entry.get("override_architecture") is not None:
                self._fail(f"{place}.override_architecture", "is not supported", "remove it: tensors match by name")
            lora = entry.get("lora")
            model = self._path(entry.get("model"), f"{place}.model")
            return Reference(model, None if lora is None else self._path(lora, f"{place}.lora"))
        if not isinstance(found, str) or Path(found).expanduser().exists():
            return Reference(self._path(found, place))
        model, plus, lora = found.partition("+")
        return Reference(self._path(model, place), self._path(lora, place) if plus else None)

    def _path(self, found: object, place: str) -> str:
        if isinstance(found, dict):
            entry = self._mapping(found, place, ("path", "revision"))
            path, revision = self._path(entry.get("path"), f"{place}.path"), self._text(entry, "revision")
            return path if revision is None else f"{path}@{revision}"
        if not isinstance(found, str) or not found:
            self._fail(place, f"is {found!r}", "it must be a folder, a file or a hub id")
        beside = self.file.parent / Path(found).expanduser()
        return str(beside) if beside.exists() and not Path(found).expanduser().exists() else found

    def _tokenizer(self, data: Mapping[str, object], base: Reference | None) -> str | None:
        """The key that asks for the base's tokenizer, if one does; any other request is refused."""
        place, source = "tokenizer_source", data.get("tokenizer_source")
        if data.get("tokenizer") is not None:
            entry = self._mapping(data["tokenizer"], "tokenizer", ("source", "tokens", "pad_to_multiple_of"))
            for key in ("tokens", "pad_to_multiple_of"):
                if entry.get(key):
                    self._fail(
                        f"tokenizer.{key}", "is not supported", "remove it: the base's tokenizer is kept as it is"
                    )
            place, source = "tokenizer.source", entry.get("source", "union")
        if source is None:
            return None
        if source == "base" or (base is not None and source != "union" and self._reference(source, place) == base):
            return place
        return self._fail(place, f"{source!r} is not supported", "use base: the result has the base's vocabulary")

    def _parameters(self, found: object, place: str) -> Parameters:
        if found is None:
            return {}
        if not isinstance(found, dict):
            self._fail(place, f"is {found!r}", "it must be a mapping of names to values")
        return {str(name): self._setting(value, f"{place}.{name}") for name, value in found.items()}

    def _setting(self, found: object, place: str) -> Setting:
        if isinstance(found, dict):
            found = [found]
        if isinstance(found, list) and found and all(isinstance(entry, dict) for entry in found):
            return tuple(self._condition(entry, f"{place}[{i}]") for i, entry in enumerate(found))
        return (Condition(None, self._values(found, place)),)

    def _condition(self, found: object, place: str) -> Condition:
        entry = self._mapping(found, place, ("filter", "value"))
        if "value" not in entry:
            self._fail(f"{place}.value", "is missing", "give a value, or a list of values over the depth")
        text = entry.get("filter")
        if text is not None and not isinstance(text, str):
            self._fail(f"{place}.filter", f"is {text!r}", "it must be part of a tensor's name")
        return Condition(None if text == "*" else text, self._values(entry["value"], f"{place}.value"))

    def _values(self, found: object, place: str) -> tuple[Scalar, ...]:
        values = found if isinstance(found, list) else [found]
        if not values or not all(isinstance(value, bool | int | float | str) for value in values):
            self._fail(place, f"is {found!r}", "it must be a value, a list of values, or a list of {filter, value}")
        return tuple(values)

    def _mapping(self, found: object, place: str, known: tuple[str, ...]) -> Mapping[str, object]:
        if not isinstance(found, dict):
            self._fail(place, f"is {type(found).__name__}, not a mapping", f"known here: {', '.join(known)}")
        for key in found:
            if key not in known:
                at = str(key) if place == "the file" else f"{place}.{key}"
                self._fail(at, "is not a key that mergekit knows", closest(str(key), known))
        return found

    def _list(self, found: object, place: str) -> list[object]:
        if not isinstance(found, list) or not found:
            self._fail(place, f"is {found!r}", "it must be a list with an entry or more")
        return found

    def _text(self, data: Mapping[str, object], key: str) -> str | None:
        value = data.get(key)
        if value is not None and (not isinstance(value, str) or not value):
            self._fail(key, f"is {value!r}", "it must be a name")
        return value

    def _fail(self, place: str, problem: str, hint: str) -> NoReturn:
        raise RetexError(f"{self.file}: {place} {problem}", hint)
