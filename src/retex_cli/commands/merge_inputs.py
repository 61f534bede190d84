"""What a merge measures on the tasks' inputs before it writes: statistics, a scale, BatchNorm's running statistics."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from retex_cli.commands.expert_models import ExpertModels, TaskInputs, read_inputs, read_validation
from retex_cli.commands.merge_scale import at_scale, choose_scale, wanted_scale
from retex_cli.commands.merge_statistics import measure
from retex_cli.errors import RetexError, UsageError
from retex_cli.io.inputs import Example
from retex_cli.merging.depth import is_running_statistic
from retex_cli.merging.engine import Copy, Merge
from retex_cli.merging.memory import Held, merge_steps
from retex_cli.merging.table import AUTO, VALIDATION, Method
from retex_cli.models.batchnorm import measure_batchnorm
from retex_cli.progress import Progress

AVERAGE, REESTIMATE = "average", "reestimate"
BATCHNORM = (AVERAGE, REESTIMATE)
"""Ways to come by the running statistics of a merged BatchNorm."""

USUAL_SAMPLES = 256
"""Inputs of a task that are read where the method has no usual number of its own."""


@dataclass(frozen=True)
class InputsConfig:
    """``inputs`` and ``validation``: task -> file. ``samples``: inputs of a task that are measured on, the method's
    usual number by default. ``batchnorm``: one of ``BATCHNORM``."""

    inputs: Mapping[str, str]
    validation: Mapping[str, str]
    samples: int | None
    batchnorm: str
    batch_size: int


@dataclass(frozen=True)
class InputsPlan:
    """What will be measured on which rows. ``scale`` is "auto", "validation" or "" where every scale is given."""

    config: InputsConfig
    method: Method
    scale: str
    data: Mapping[str, TaskInputs]

    @property
    def idle(self) -> bool:
        """Whether nothing is measured at all."""
        return not self.data


def plan_inputs(
    config: InputsConfig,
    method: Method,
    tasks: Sequence[str],
    options: Mapping[str, object],
    overrides: Mapping[str, Mapping[str, object]],
    names: Sequence[str],
) -> InputsPlan:
    """Read the rows that will be needed, none where none are. ``names``: the merged tensors'."""
    if config.batchnorm not in BATCHNORM:
        raise UsageError(f"unknown --batchnorm {config.batchnorm!r}", f"it can be {' or '.join(BATCHNORM)}")
    scale = wanted_scale(method, options, overrides)
    if config.batchnorm == REESTIMATE and not any(map(is_running_statistic, names)):
        raise UsageError("--batchnorm reestimate: the base has no running statistics", "leave it out")
    data: dict[str, TaskInputs] = {}
    unlabelled = method.needs_inputs or scale == AUTO or config.batchnorm == REESTIMATE
    for task in tasks:
        samples = config.samples or method.samples or USUAL_SAMPLES
        given = TaskInputs((), (), ())
        if unlabelled:
            given = read_inputs(task, config.inputs.get(task), samples, hold_out=scale == AUTO)
        if scale == VALIDATION:
            given = replace(given, validation=read_validation(task, config.validation.get(task)).validation)
        if given != TaskInputs((), (), ()):
            data[task] = given
    return InputsPlan(config, method, scale, data)


@dataclass(frozen=True)
class Prepared:
    """Steps that need no inputs any more, and what was found, for the recipe and for people."""

    steps: Sequence[Merge | Copy]
    found: Mapping[str, object]


def prepare(
    plan: InputsPlan,
    steps: Sequence[Merge | Copy],
    models: ExpertModels,
    stack: ExitStack,
    *,
    threads: int,
    budget: Callable[[Sequence[Merge | Copy]], int],
    progress: Progress,
) -> Prepared:
    """Measure what is to be measured. Files of statistics live until ``stack`` closes; ``budget`` gives the bytes that
    merging some steps may hold."""
    found: dict[str, object] = {}
    config = plan.config
    if plan.method.needs_inputs:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="retex-")))
        steps = measure(
            plan.method, steps, models, plan.data, folder, stack,
            batch_size=config.batch_size, threads=threads, progress=progress,
        )  # fmt: skip
        found["measured_inputs"] = {task: len(given.measured) for task, given in plan.data.items()}
    adjust = _Reestimated(plan, models, progress) if config.batchnorm == REESTIMATE else _as_merged
    if plan.scale:
        scale = choose_scale(
            plan.scale, plan.method, steps, models, plan.data, adjust,
            batch_size=config.batch_size, threads=threads, budget=budget(steps), progress=progress,
        )  # fmt: skip
        progress.note(f"{plan.method.name}: {scale.sentence()}")
        found["scale"] = scale.to_json()
        steps = at_scale(steps, scale.alpha)
    if config.batchnorm == REESTIMATE:
        found["batchnorm"] = "re-estimated on the tasks' inputs"
        adjusted = adjust(merge_steps(plan.method, steps, threads=threads, budget=budget(steps)))
        steps = [_with_statistic(step, adjusted) for step in steps]
    return Prepared(steps, found)


def _as_merged(merged: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    del merged
    return {}


def _with_statistic(step: Merge | Copy, adjusted: Mapping[str, Tensor]) -> Merge | Copy:
    """A running statistic becomes a copy of what was re-estimated."""
    if isinstance(step, Copy) or not is_running_statistic(step.view.name):
        return step
    name = step.view.name
    return Copy(Held(f"re-estimated {name!r}", adjusted[name]), step.view.numel, step.dtype)


@dataclass(frozen=True)
class _Reestimated:
    """The running statistics of merged weights' network on inputs of all tasks, mixed, by the base's names."""

    plan: InputsPlan
    models: ExpertModels
    progress: Progress

    def __call__(self, merged: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        task = next(iter(self.models.experts))
        theirs = self.models.alignments[task].shared
        network = self.models.network(task)
        self.models.load_merged(network, task, merged)
        batches = [network.inputs(batch) for batch in _mixed(self.plan.data, self.plan.config.batch_size)]
        measured = measure_batchnorm(network, batches, self.progress)
        names = {n: network.own_name(theirs.get(n, n)) for n in merged if is_running_statistic(n)}
        strange = [name for name, own in names.items() if own not in measured]
        if strange:
            raise RetexError(
                f"tensor {strange[0]!r} is no running statistic of {type(network.module).__name__}",
                "use --batchnorm average",
            )
        return {name: measured[own] for name, own in names.items()}


def _mixed(data: Mapping[str, TaskInputs], size: int) -> Iterator[list[Example]]:
    """Batches in which tasks take turns; a last batch under half the size is left out, its variances are poor."""
    longest = max(len(given.measured) for given in data.values())
    order = [g.measured[k] for k in range(longest) for g in data.values() if k < len(g.measured)]
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        if start == 0 or len(batch) > size // 2:
            yield batch
