"""Statistics of every task's inputs, measured in its expert and kept on the disk while a merge reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from retex_cli.commands.expert_models import ExpertModels, TaskInputs
from retex_cli.commands.merge_plan import Stored
from retex_cli.io.artefact import open_artefact, write_artefact
from retex_cli.io.checkpoint import Checkpoint
from retex_cli.merging.engine import Copy, Merge
from retex_cli.merging.table import Method
from retex_cli.models.statistics import fisher_diagonal, gram_layers, input_grams
from retex_cli.progress import Progress

FORMAT, VERSION = "retex.statistics", 1


def measure(
    method: Method,
    steps: Sequence[Merge | Copy],
    models: ExpertModels,
    inputs: Mapping[str, TaskInputs],
    folder: Path,
    stack: ExitStack,
    *,
    batch_size: int,
    threads: int,
    progress: Progress,
) -> list[Merge | Copy]:
    """The steps, each tensor with what was measured of it for every task that has it; files in ``folder``.

    A note says how many matrices have no statistics, and are merged without.
    """
    files: dict[str, Checkpoint] = {}
    for task in models.experts:
        path = folder / f"{task}.safetensors"
        network = models.network(task)
        models.load_expert(network, task)
        shared = models.alignments[task].shared
        theirs = [shared[step.view.name] for step in _merges(steps) if task in step.view.tasks]
        names = {network.own_name(name): name for name in theirs}
        examples = inputs[task].measured
        if method.needs == "fisher":
            found = fisher_diagonal(network, examples, names, threads, progress)
        else:
            layers = names.keys() & gram_layers(network.module).keys()
            found = dict(input_grams(network, examples, layers, batch_size, threads, progress))
        found = {names[own]: value for own, value in found.items()}
        write_artefact(path, found, {}, format=FORMAT, version=VERSION)
        del found
        files[task] = stack.enter_context(open_artefact(path, format=FORMAT, versions={VERSION}))
    measured = [_with_statistics(step, models, files) for step in steps]
    lacking = [s.view.name for s in _merges(measured) if len(s.view.shape) > 1 and not s.view.statistics]
    if lacking:
        progress.note(
            f"{method.name}: {len(lacking)} matrices have no statistics ({lacking[0]}, …) and are merged without"
        )
    return measured


def _merges(steps: Sequence[Merge | Copy]) -> list[Merge]:
    return [step for step in steps if isinstance(step, Merge)]


def _with_statistics(step: Merge | Copy, models: ExpertModels, files: Mapping[str, Checkpoint]) -> Merge | Copy:
    if isinstance(step, Copy):
        return step
    view = step.view
    names = [models.alignments[task].shared[view.name] for task in view.tasks]
    if not all(name in files[task].tensors for task, name in zip(view.tasks, names, strict=True)):
        return step
    sources = tuple(Stored(files[task], name) for task, name in zip(view.tasks, names, strict=True))
    return replace(step, view=replace(view, statistics=sources))
