"""What a mergekit file asks for, as a merge of retex: method, options per task and per tensor, type, inputs.

``mergekit_rules`` says which of its methods is which of ours. Parameters are looked up as mergekit does: the model's
own, the slice's, the file's, then the default; the first filter that is part of the tensor's name decides; a list is
interpolated over the layers of the model, and what lies outside of them takes its first value. What mergekit would
silently ignore because it is misspelt is refused.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from retex_cli.commands.merge_recipe import Origin
from retex_cli.commands.mergekit_rules import OTHERS, PARAMETERS, RULES, Rule
from retex_cli.errors import RetexError, UsageError
from retex_cli.io.checkpoint import Checkpoint, open_checkpoint, open_expert
from retex_cli.io.mergekit_config import (
    Input,
    MergekitConfig,
    Parameters,
    Reference,
    Scalar,
    Setting,
    closest,
    read_mergekit,
)
from retex_cli.io.naming import is_buffer
from retex_cli.merging.depth import block_of

if TYPE_CHECKING:
    from retex_cli.commands.merge import MergeConfig

Options = dict[str, object]


def from_mergekit(path: str, settings: MergeConfig) -> tuple[MergeConfig, Origin]:
    """``settings`` with what mergekit's file at ``path`` says about what is merged, and how; its models' headers are
    opened for that. A ``dtype`` in ``settings`` beats the file's. ``RetexError`` for what cannot be honoured.
    """
    if settings.base or settings.experts or settings.options or settings.overrides:
        raise UsageError(f"{path} says what is merged, and how", "give no base, experts or options beside it")
    config = read_mergekit(Path(path))
    rule = RULES.get(config.method)
    if rule is None:
        hint = f"retex reads {', '.join(RULES)}" if config.method in OTHERS else closest(config.method, RULES)
        config.fail("merge_method", f"{config.method!r} has no counterpart in retex", hint)
    base, experts = _models(config, rule)
    notes = [f"{path}: {config.method} as mergekit computes it, by retex's {rule.method}: {rule.semantics}"]
    notes += _check_names(config, rule)
    with ExitStack() as stack:
        opened = stack.enter_context(open_checkpoint(base))
        others = [stack.enter_context(open_expert(_expert_path(config, e, base), opened)) for e in experts.values()]
        names = [
            name
            for name, info in opened.tensors.items()
            if not is_buffer(name, info.shape, info.dtype.is_floating_point)
        ]
        dtype = _dtype(config, opened, others, notes)
    by_tensor = _Options(config, rule, experts, names).by_tensor()
    options, overrides = _common(by_tensor)
    if config.tokenizer:
        notes.append(f"{path}: {config.tokenizer}: the base's is kept; a token id means the same token in every model")
    translated = replace(
        settings,
        base=base,
        experts={task: _expert_path(config, entry, base) for task, entry in experts.items()},
        method=rule.method,
        options=options,
        overrides=overrides,
        dtype=settings.dtype or dtype,
    )
    return translated, Origin(path, config.sha256, tuple(notes))


def _models(config: MergekitConfig, rule: Rule) -> tuple[str, dict[str, Input]]:
    """The base's reference, and the models that are merged by task name."""
    reference = config.base
    if reference is None:
        if config.method != "linear":
            config.fail(
                "base_model", "is missing", f"{config.method} merges task vectors: name the model they start from"
            )
        reference = Reference(config.inputs[0].reference.model)
    if reference.lora:
        config.fail("base_model", "has an adapter", "apply it first and name the result")
    inputs = [entry for entry in config.inputs if rule.inputs or entry.reference != reference]
    if rule.inputs and config.base is not None and config.base not in [entry.reference for entry in inputs]:
        inputs.append(Input(config.base, "base_model"))
    if config.method == "slerp" and len(inputs) != 2:
        config.fail("models", f"has {len(inputs)} with the base", "slerp takes base_model and one other model")
    if not inputs:
        config.fail("models", "has the base alone", "name an expert or more")
    return reference.model, _named(inputs)


def _named(inputs: Sequence[Input]) -> dict[str, Input]:
    """Task names: the last part of each reference, made unique."""
    named: dict[str, Input] = {}
    for entry in inputs:
        last = re.split(r"[/\\]", (entry.reference.lora or entry.reference.model).rstrip("/\\"))[-1].partition("@")[0]
        name = re.sub(r"[^A-Za-z0-9._-]", "-", last).lstrip("._-") or "model"
        taken, number = {*named, "auto"}, 2
        unique = name
        while unique in taken:
            unique, number = f"{name}-{number}", number + 1
        named[unique] = entry
    return named


def _expert_path(config: MergekitConfig, entry: Input, base: str) -> str:
    if entry.reference.lora and entry.reference.model != base:
        config.fail(
            f"{entry.place}.model",
            f"applies an adapter to {entry.reference.model!r}, which is not base_model",
            "apply it first and name the result",
        )
    return entry.reference.lora or entry.reference.model


def _check_names(config: MergekitConfig, rule: Rule) -> list[str]:
    """Refuse parameters that mergekit has nowhere, or would not read there; notes on those without effect."""
    notes = []
    scopes = [(place, parameters, True) for place, parameters in config.scopes.items()]
    scopes += [(f"{entry.place}.parameters", entry.parameters, False) for entry in config.inputs]
    for place, parameters, shared in scopes:
        for name in parameters:
            if name not in PARAMETERS:
                config.fail(f"{place}.{name}", "is not a parameter that mergekit knows", closest(name, PARAMETERS))
            if name in rule.shared and not shared:
                config.fail(f"{place}.{name}", "is not read there by mergekit", "move it to parameters at the top")
            if name not in rule.shared and name not in rule.each:
                notes.append(f"{config.file}: {place}.{name} has no effect with {config.method}, as in mergekit")
    return notes


def _dtype(config: MergekitConfig, base: Checkpoint, experts: Sequence[Checkpoint], notes: list[str]) -> str | None:
    """The type that is written: ``out_dtype``, ``dtype``, or the widest of the inputs if the base has another one."""
    for key, name in (("out_dtype", config.out_dtype), ("dtype", config.dtype)):
        if name is None:
            continue
        short = name.removeprefix("torch.")
        if short not in ("float32", "bfloat16", "float16"):
            config.fail(key, f"is {name!r}", "it can be float32, bfloat16 or float16")
        if config.dtype and config.dtype.removeprefix("torch.") != "float32":
            notes.append(f"{config.file}: dtype {config.dtype}: retex computes in float32 and rounds once, at the end")
        return short
    types = {info.dtype for info in base.tensors.values() if info.dtype.is_floating_point}
    every = types.union(*({i.dtype for i in e.tensors.values() if i.dtype.is_floating_point} for e in experts))
    widest = reduce(torch.promote_types, every)
    return None if types == {widest} else str(widest).removeprefix("torch.")


class _Options:
    """The options of every tensor."""

    def __init__(self, config: MergekitConfig, rule: Rule, experts: Mapping[str, Input], names: Sequence[str]) -> None:
        self.config, self.rule, self.experts, self.names = config, rule, experts, names
        self.blocks = Counter[str]()
        for name in names:
            if place := block_of(name):
                self.blocks[place[0]] = max(self.blocks[place[0]], place[1] + 1)
        self._check_layers()

    def _check_layers(self) -> None:
        """A slice must hold every layer of the model."""
        count = max(self.blocks.values(), default=0)
        for entry in self.config.inputs:
            if entry.layers is not None and entry.layers != (0, count):
                self.config.fail(
                    f"{entry.place}.layer_range", f"is {list(entry.layers)}", f"retex merges whole models: [0, {count}]"
                )

    def by_tensor(self) -> dict[str, Options]:
        """Tensor name -> options; what cannot be said is refused."""
        return {name: self._options(name, self._depth(name)) for name in self.names}

    def _depth(self, name: str) -> float:
        """0 for the first layer to 1 for the last; 1 for an only layer, and 0 outside of them, as mergekit has it."""
        place = block_of(name)
        last = self.blocks[place[0]] - 1 if place else 0
        return 0.0 if place is None else place[1] / last if last else 1.0

    def _options(self, name: str, depth: float) -> Options:
        options: Options = dict(self.rule.fixed)
        scopes = list(self.config.scopes.values())
        for theirs, (ours, default) in self.rule.shared.items():
            options[ours] = self._value(theirs, scopes, name, depth, default, "parameters")
        tasks: dict[str, dict[str, float]] = {task: {} for task in self.experts}
        for theirs, (ours, default) in self.rule.each.items():
            for task, entry in self.experts.items():
                place = f"{entry.place}.parameters"
                value = self._value(theirs, [entry.parameters, *scopes], name, depth, default, place)
                tasks[task][ours] = float(value)
        for task, values in tasks.items():
            self._adjust(values, f"{self.experts[task].place}.parameters", name)
        for option in next(iter(tasks.values())):
            numbers = {task: values[option] for task, values in tasks.items()}
            options[option] = numbers if len(set(numbers.values())) > 1 else next(iter(numbers.values()))
        self._finish(options)
        return options

    def _value(
        self,
        parameter: str,
        scopes: Sequence[Parameters],
        name: str,
        depth: float,
        default: float | bool | None,
        place: str,
    ) -> float | bool:
        boolean = isinstance(default, bool)
        for scope in scopes:
            chosen = _matching(scope.get(parameter, ()), name)
            if chosen is not None:
                return self._interpolated(chosen, depth, boolean, f"{parameter} of {place}")
        if default is None:
            self.config.fail(f"{place}.{parameter}", f"is missing for {name!r}", "mergekit has no default for it")
        return default

    def _interpolated(self, values: Sequence[Scalar], depth: float, boolean: bool, place: str) -> float | bool:
        if boolean:
            value = values[int(depth * (len(values) - 1))]
            if not isinstance(value, bool):
                self.config.fail(place, f"is {value!r}", "it must be true or false")
            return value
        try:
            numbers = [_number(value) for value in values]
        except ValueError:
            self.config.fail(place, f"is {values if len(values) > 1 else values[0]!r}", "it must be a finite number")
        scaled = depth * (len(numbers) - 1)
        first = int(scaled)
        second, share = min(len(numbers) - 1, first + 1), scaled - first
        return (1 - share) * numbers[first] + share * numbers[second]

    def _adjust(self, values: dict[str, float], place: str, name: str) -> None:
        """Where mergekit treats a density of 1 or more apart, and what it refuses."""
        density = values.get("density")
        if density is None:
            return
        if density <= 0:
            self.config.fail(f"{place}.density", f"is {density:g} for {name!r}", "leave the model out, or weight: 0")
        values["density"] = min(density, 1.0)
        if density >= 1:
            values.update({option: 0.0 for option in ("gamma", "window") if option in values})
        elif "window" in values:
            epsilon = values["window"]
            if not (density + epsilon < 1 and density - epsilon > 0):
                hint = "density plus and minus epsilon must lie between 0 and 1"
                self.config.fail(f"{place}.epsilon", f"is {epsilon:g}, density {density:g} for {name!r}", hint)
            values["window"] = 2 * epsilon

    def _finish(self, options: Options) -> None:
        """What depends on several options, or on the order of the models."""
        if options.pop("filter_wise", False):
            self.config.fail("parameters.filter_wise", "is not supported", "remove it: one angle per tensor")
        if "rescale" in options:
            random = self.rule.method not in ("ties", "breadcrumbs")
            if options["rescale"] and not random:
                self.config.fail("parameters.rescale", "is not supported for this method", "set it to false")
            rescale = "l1" if options.pop("rescale") else "off"
            options.update({"rescale": rescale} if random else {})
        if self.config.method == "sce":
            share = options["density"]
            assert isinstance(share, float)
            if share <= 0:
                self.config.fail("parameters.select_topk", f"is {share:g}", "nothing would be merged")
            options["density"] = min(share, 1.0)
        if self.config.method == "slerp":
            t = options["t"]
            assert isinstance(t, float)
            if not 0 <= t <= 1:
                self.config.fail("parameters.t", f"is {t:g}", "it must lie between 0 and 1")
            if self.experts[min(self.experts)].reference != self.config.base:  # ours counts from the first name on
                options["t"] = 1 - t


def _matching(setting: Setting, name: str) -> tuple[Scalar, ...] | None:
    for condition in setting:
        if condition.filter is None or condition.filter in name:
            return condition.values
    return None


def _number(value: Scalar) -> float:
    if isinstance(value, bool):
        raise ValueError
    number = float(value)
    if number - number != 0:
        raise ValueError
    return number


def _common(by_tensor: Mapping[str, Options]) -> tuple[Options, dict[str, Options]]:
    """The options that most tensors have, and for the others what differs."""
    if not by_tensor:
        raise RetexError("the base has no tensor to merge", "give another base_model")
    keys = {name: json.dumps(options, sort_keys=True) for name, options in by_tensor.items()}
    usual = json.loads(Counter(keys.values()).most_common(1)[0][0])
    differing = {
        name: {option: value for option, value in options.items() if value != usual[option]}
        for name, options in by_tensor.items()
    }
    return usual, {name: options for name, options in differing.items() if options}
