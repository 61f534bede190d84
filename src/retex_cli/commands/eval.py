"""``retex eval``: experts, merged checkpoint and recovered experts side by side on labelled test data.

The only command that reads test data. What it evaluates is built from the three artefacts exactly as ``retex recover``
builds it; the experts themselves are opened only to be compared with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from retex_cli.commands.eval_report import EvalPlanReport, EvalReport
from retex_cli.commands.identifier import Identification, Identifier, identifications
from retex_cli.commands.offsets_file import OffsetsFile
from retex_cli.commands.recover import tensors_of
from retex_cli.errors import GateMissed, RetexError, UsageError
from retex_cli.evaluation.gates import check_gates, missed_gates, parse_gates
from retex_cli.evaluation.protocols import PROTOCOLS, Answers, TaskAnswers, mean_scores
from retex_cli.io.checkpoint import Checkpoint, open_checkpoint, open_expert
from retex_cli.io.inputs import Example, read_rows
from retex_cli.io.provenance import checkpoint_digests
from retex_cli.models.classifier import Heard, classify, likeliest
from retex_cli.models.device import choose_device
from retex_cli.models.network import Network, label_names
from retex_cli.offsets.predict import Predictor
from retex_cli.parallel import thread_count
from retex_cli.progress import Progress

NO_OFFSETS = ""
"""Stands for the merged checkpoint where an encoder is chosen by task."""


@dataclass(frozen=True)
class EvalConfig:
    """``tests``: task -> labelled file. ``output``: where the JSON goes besides the report. ``logits``: a safetensors
    file for every expert's, the merged and every recovered expert's (protocol K) logits, in the order of the tests.
    ``picture``: an SVG file for the confusion of tasks. ``fail_under``: see ``evaluation.gates``. ``base`` is needed
    only where an expert is a LoRA adapter. ``blend``: under E and H several experts answer inputs whose task is
    unsure, as with ``Experts``. ``model``: see ``models.network.Network``."""

    merged: str
    offsets: str
    experts: Mapping[str, str]
    tests: Mapping[str, str]
    signatures: str | None = None
    base: str | None = None
    model: str | None = None
    output: str | None = None
    logits: str | None = None
    protocols: tuple[str, ...] = PROTOCOLS
    blend: bool = True
    picture: str | None = None
    fail_under: str | None = None
    batch_size: int = 64
    device: str = "auto"
    threads: int | None = None


@dataclass(frozen=True)
class EvalPlan:
    """Artefacts and experts opened by their headers, tests read and their labels checked."""

    config: EvalConfig
    file: OffsetsFile
    experts: Mapping[str, Checkpoint]
    tests: Mapping[str, tuple[Example, ...]]
    gates: Mapping[str, float]

    def report(self) -> EvalPlanReport:
        return EvalPlanReport({task: len(rows) for task, rows in self.tests.items()}, self.config.protocols)


def plan(config: EvalConfig) -> EvalPlan:
    """Open everything, read the tests, and refuse what cannot be evaluated before any model runs."""
    gates = parse_gates(config.fail_under) if config.fail_under else {}
    unknown = [p for p in config.protocols if p not in PROTOCOLS]
    if unknown or not config.protocols:
        raise UsageError(f"unknown protocol {', '.join(unknown) or '(none)'}", f"any of {', '.join(PROTOCOLS)}")
    check_gates(gates, config.protocols)
    if set(config.protocols) - {"K"} and not config.signatures:
        raise UsageError("protocols E and H need a signature file", "give --signatures FILE, or --protocols K")
    if config.picture and not config.picture.endswith(".svg"):
        raise UsageError(f"--picture {config.picture}: the picture is an SVG file", "give a name that ends in .svg")
    if config.picture and set(config.protocols) == {"K"}:
        raise UsageError(
            "--picture shows which tasks are taken for which, and protocol K identifies none", "add E or H"
        )
    if not config.tests:
        raise UsageError("no test data to evaluate on", "give --test NAME=FILE, or test in retex.toml")
    file = OffsetsFile(config.offsets, open_checkpoint(config.merged))
    base = open_checkpoint(config.base) if config.base else None
    experts, tests = {}, {}
    for task in sorted(config.tests):
        file.task(task)
        reference = config.experts.get(task)
        if reference is None:
            raise UsageError(f"no expert given for task {task!r}", f"give --expert {task}=REF to compare with")
        experts[task] = open_checkpoint(reference) if base is None else open_expert(reference, base)
        labels = _labels(file.side_files(task), config.offsets, task)
        tests[task] = tuple(_checked(config.tests[task], task, labels))
    return EvalPlan(config, file, experts, tests, gates)


def _labels(files: Mapping[str, bytes], path: str, task: str) -> tuple[str, ...]:
    if "config.json" not in files:
        raise RetexError(f"{path}: task {task!r} has no config.json", "fit the offsets from a folder, not a bare file")
    return label_names(json.loads(files["config.json"]))


def _checked(path: str, task: str, labels: Sequence[str]) -> list[Example]:
    """The rows of a test file, labels as names. RetexError names the first row whose label the head cannot give."""
    rows = read_rows(Path(path))
    for row in rows:
        if row.label is None:
            raise RetexError(f"{row.source}: no label", "test data is labelled: give every row a label")
        if row.label not in labels:
            some = ", ".join(labels[:5]) + (", …" if len(labels) > 5 else "")
            raise RetexError(
                f"{row.source}: label {row.label!r} is outside the head of task {task!r}, which has {some}",
                "use the label names of the expert's config.json",
            )
    return rows


@dataclass
class _Bench:
    """What the run shares: one model per task, filled with one set of weights at a time."""

    plan: EvalPlan
    predictor: Predictor
    progress: Progress
    models: dict[str, Network] = field(default_factory=dict)

    def recovered(self, head: str, encoder: str, rows: Sequence[Example]) -> Tensor:
        """Logits of task ``head``'s model on ``rows`` with the shared tensors of ``encoder``."""
        model = self.models[head]
        tensors = tensors_of(self.plan.file, head, self.predictor, None if encoder == head else encoder)
        model.load(tensors, self.plan.config.offsets)
        return self._logits(model, rows)

    def expert(self, task: str) -> Tensor:
        """Logits of the expert itself."""
        checkpoint = self.plan.experts[task]
        model = self.models[task]
        model.load(checkpoint.items(), checkpoint.reference)
        return self._logits(model, self.plan.tests[task])

    def _logits(self, model: Network, rows: Sequence[Example]) -> Tensor:
        config = self.plan.config
        return classify(model, rows, config.batch_size, thread_count(config.threads), self.progress)

    def answers(self, task: str, logits: Tensor) -> Answers:
        """Label names."""
        names: Answers = np.array(self.models[task].labels, dtype=object)
        chosen: Answers = names[logits.argmax(-1).numpy()]
        return chosen


def run(plan: EvalPlan, progress: Progress) -> EvalReport:
    """Run every model over every test input. EvalGateMissed, once all is written, where ``fail_under`` is missed."""
    config = plan.config
    device = choose_device(config.device, progress)
    plan.file.check_merged(checkpoint_digests(plan.file.merged, thread_count(config.threads)))
    tasks = list(plan.tests)
    identifier = None
    if config.signatures and set(config.protocols) - {"K"}:
        identifier = Identifier.open(
            config.signatures, config.merged, config.device, progress, model=config.model, threads=config.threads
        )
        _check_tasks(plan, identifier)
    everyone = sorted({*tasks, *(identifier.tasks if identifier else ())})
    bench = _Bench(plan, plan.file.predictor(everyone), progress)
    for task in everyone:
        name = f"{config.offsets}: task {task!r}"
        bench.models[task] = Network.of(plan.file.side_files(task), name, device, model=config.model)
    logits = {task: _known(bench, task) for task in tasks}
    identified = _identify(bench, identifier) if identifier else {}
    answers = [_answers(bench, task, logits[task], identified.get(task)) for task in tasks]
    report = EvalReport.of(
        answers,
        identifier.tasks if identifier else (),
        offset_bytes={task: plan.file.offset_bytes(task) for task in tasks},
        expert_bytes={task: plan.file.task(task).expert_bytes for task in tasks},
        files=_files(config),
        precision="bfloat16 matrix products" if any(n.fast_bf16 for n in bench.models.values()) else "float32",
    )
    _write(config, report, logits)
    mean = mean_scores(report.scores)
    normalised, worst = mean["normalised"], mean["worst"]
    assert isinstance(normalised, Mapping)
    assert isinstance(worst, Mapping)
    missed = missed_gates(plan.gates, normalised, worst.get("K", 0.0))
    if missed:
        raise EvalGateMissed("; ".join(missed), report)
    return report


class EvalGateMissed(GateMissed):
    """The evaluation is done and below the caller's threshold; ``report`` is what would have been returned."""

    def __init__(self, message: str, report: EvalReport) -> None:
        super().__init__(message, "lower --fail-under, or give the offsets a larger --budget")
        self.report = report


def _check_tasks(plan: EvalPlan, identifier: Identifier) -> None:
    plan.file.check_covers(identifier.tasks, plan.config.signatures or "")
    unseen = [task for task in plan.tests if task not in identifier.tasks]
    if unseen:
        raise RetexError(
            f"{plan.config.signatures}: has no signature of task {unseen[0]!r}", "build the signatures with its inputs"
        )


def _known(bench: _Bench, task: str) -> dict[str, Tensor]:
    """Logits of the expert, of the merged checkpoint with the expert's head, and of the recovered expert."""
    rows = bench.plan.tests[task]
    bench.progress.start(f"{task}: expert, merged, recovered", 3 * len(rows))
    return {
        "expert": bench.expert(task),
        "merged": bench.recovered(task, NO_OFFSETS, rows),
        "K": bench.recovered(task, task, rows),
    }


def _identify(bench: _Bench, identifier: Identifier) -> dict[str, list[Identification]]:
    found = {}
    for task, rows in bench.plan.tests.items():
        bench.progress.start(f"{task}: identifying", len(rows))
        decisions = identifier.decide(rows, bench.progress)
        found[task] = identifications([row.source for row in rows], decisions, identifier.tasks)
    return found


def _answers(
    bench: _Bench, task: str, logits: Mapping[str, Tensor], found: Sequence[Identification] | None
) -> TaskAnswers:
    protocols = bench.plan.config.protocols
    recovered = {"K": bench.answers(task, logits["K"])} if "K" in protocols else {}
    if found is not None:
        asked = [name for name in PROTOCOLS if name in protocols and name != "K"]
        recovered |= _identified(bench, task, logits["K"], found, asked)
    return TaskAnswers(
        task=task,
        truth=np.array([row.label for row in bench.plan.tests[task]], dtype=object),
        expert=bench.answers(task, logits["expert"]),
        merged=bench.answers(task, logits["merged"]),
        recovered=recovered,
        identified=None if found is None else np.array([one.task for one in found], dtype=object),
        unknown=None if found is None else np.array([one.unknown for one in found]),
    )


def _identified(
    bench: _Bench, task: str, known: Tensor, found: Sequence[Identification], protocols: Sequence[str]
) -> dict[str, Answers]:
    """Answers under E and H. ``known`` is what the expert of ``task`` says: only other experts and other heads need
    another pass."""
    rows, blend = bench.plan.tests[task], bench.plan.config.blend
    shares = [one.experts(blend=blend) for one in found]
    asked: dict[tuple[str, str], list[int]] = {}
    for i, mine in enumerate(shares):
        for way in dict.fromkeys(_way(protocol, task, expert) for protocol in protocols for expert in mine):
            asked.setdefault(way, []).append(i)
    asked.pop((task, task), None)
    said = {(task, task): dict(enumerate(known))}
    bench.progress.start(f"{task}: sent to other experts", sum(map(len, asked.values())))
    for (expert, head), places in asked.items():
        logits = bench.recovered(head, expert, [rows[i] for i in places])
        said[expert, head] = dict(zip(places, logits, strict=True))

    def answer(protocol: str, i: int) -> str:
        ways = {expert: _way(protocol, task, expert) for expert in shares[i]}
        heard = {e: Heard(bench.models[way[1]].labels, said[way][i], shares[i][e]) for e, way in ways.items()}
        return likeliest(heard)[0]

    return {name: np.array([answer(name, i) for i in range(len(rows))], dtype=object) for name in protocols}


def _way(protocol: str, task: str, expert: str) -> tuple[str, str]:
    """An expert that is asked, and the head that it answers with."""
    return expert, task if protocol == "E" else expert


def _files(config: EvalConfig) -> dict[str, int]:
    """Bytes on disk of the three artefacts; a merged folder with everything in it."""
    files = {}
    for reference in (config.merged, config.offsets, config.signatures):
        if reference is None:
            continue
        path = Path(reference)
        if path.is_dir():
            files[f"{reference.rstrip('/')}/"] = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        elif path.is_file():
            files[reference] = path.stat().st_size
    return files


def _write(config: EvalConfig, report: EvalReport, logits: Mapping[str, Mapping[str, Tensor]]) -> None:
    if config.output:
        Path(config.output).write_text(json.dumps(report.to_json(), indent=1) + "\n")
    if config.picture and report.confusion:
        Path(config.picture).write_text(report.confusion.svg(), encoding="utf-8")
    if config.logits:
        from safetensors.torch import save_file

        save_file(
            {f"{task}/{name}": value for task, group in logits.items() for name, value in group.items()}, config.logits
        )
