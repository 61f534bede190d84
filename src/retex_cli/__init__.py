"""retex: merge fine-tuned experts into one checkpoint and bring every one of them back from it.

Each command of the ``retex`` tool is a function here that takes the same words: ``merge``, ``fit_offsets``,
``build_signatures``, ``recover``, ``evaluate``, ``identify``, ``inspect`` and ``init``. Each plans, which checks
everything and writes nothing, then runs, and returns the report that the command would print. Model references are
paths or hub ids ``org/name[@revision]``; outputs are ``name.safetensors``, a folder or ``-`` for standard output.
``model`` (``package.module:function``) builds the network where it is no transformers model.
``progress`` (see ``retex_cli.progress``) hears of every step. Failures are ``retex_cli.errors.RetexError``.

``Predictor`` switches experts inside a model that is already loaded, without writing a file; ``Experts`` answers mixed
inputs, each by the expert of the task that it is identified as.

Importing this module imports nothing heavy: torch is loaded by the first call.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from retex_cli.errors import GateMissed, RetexError, UsageError
from retex_cli.progress import Progress, Silent

if TYPE_CHECKING:
    from retex_cli.commands.build_signatures import BuildSignaturesReport
    from retex_cli.commands.eval_report import EvalReport
    from retex_cli.commands.experts import Experts
    from retex_cli.commands.fit_report import FitOffsetsReport
    from retex_cli.commands.identify import IdentifyReport
    from retex_cli.commands.init import InitReport
    from retex_cli.commands.inspect import InspectReport
    from retex_cli.commands.merge_report import MergeReport
    from retex_cli.commands.predictor import Predictor
    from retex_cli.commands.recover import RecoverReport

__version__ = "0.1.0"

__all__ = [
    "Experts",
    "GateMissed",
    "Predictor",
    "RetexError",
    "UsageError",
    "__version__",
    "build_signatures",
    "change_signatures",
    "evaluate",
    "fit_offsets",
    "identify",
    "init",
    "inspect",
    "merge",
    "recover",
]


def __getattr__(name: str) -> object:
    """The classes, which need torch and are therefore imported when they are first asked for."""
    if name == "Predictor":
        from retex_cli.commands import predictor

        return predictor.Predictor
    if name == "Experts":
        from retex_cli.commands import experts

        return experts.Experts
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def init(
    folder: str = ".",
    *,
    base: str | None = None,
    experts: Mapping[str, str] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> InitReport:
    """Write a commented ``retex.toml`` into ``folder``, with the base and the experts that are known already."""
    from retex_cli.commands import init as command

    config = command.InitConfig(folder=folder, base=base, experts=experts or {}, overwrite=overwrite)
    return command.run(command.plan(config), progress or Silent())


def merge(
    base: str,
    experts: Mapping[str, str],
    output: str,
    *,
    method: str = "average",
    options: Mapping[str, object] | None = None,
    overrides: Mapping[str, Mapping[str, object]] | None = None,
    dtype: str | None = None,
    max_shard_size: int = 5_000_000_000,
    max_memory: int | None = None,
    allow_missing: Sequence[str] = (),
    allow_unrelated: bool = False,
    inputs: Mapping[str, str] | None = None,
    validation: Mapping[str, str] | None = None,
    samples: int | None = None,
    batchnorm: str = "average",
    model: str | None = None,
    batch_size: int = 32,
    device: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    config: str | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge ``experts`` (task name to reference) into one checkpoint of the base's shape.

    ``options`` are the method's for every parameter, ``overrides`` those for parameters whose names match a glob.
    ``max_shard_size`` and ``max_memory`` are in bytes; ``dtype`` None keeps the base's. ``inputs`` and ``validation``
    (task name to file) are read where the method, ``alpha="auto"`` or ``batchnorm="reestimate"`` asks for them;
    ``model`` is "package.module:function" for networks that transformers does not build. ``config`` is a mergekit file
    that says what is merged and how: ``base`` and ``experts`` are empty then.
    """
    from retex_cli.commands import merge as command

    settings = command.MergeConfig(
        base=base,
        experts=experts,
        output=output,
        method=method,
        options=options or {},
        overrides=overrides or {},
        dtype=dtype,
        max_shard_size=max_shard_size,
        max_memory=max_memory,
        allow_missing=tuple(allow_missing),
        allow_unrelated=allow_unrelated,
        inputs=inputs or {},
        validation=validation or {},
        samples=samples,
        batchnorm=batchnorm,
        model=model,
        batch_size=batch_size,
        device=device,
        threads=threads,
        seed=seed,
        overwrite=overwrite,
        config=config,
    )
    return command.run(command.plan(settings), progress or Silent())


def fit_offsets(
    merged: str,
    experts: Mapping[str, str],
    output: str,
    *,
    budget: str | None = None,
    base: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    overwrite: bool = False,
    add: Mapping[str, str] | None = None,
    remove: Sequence[str] = (),
    lossless: bool = False,
    total_budget: str | None = None,
    target: float | None = None,
    inputs: Mapping[str, str] | None = None,
    model: str | None = None,
    batch_size: int = 32,
    refine: bool = False,
    without: Collection[str] = frozenset(),
    seed: int = 0,
    progress: Progress | None = None,
) -> FitOffsetsReport:
    """Fit the offsets from ``merged`` to every expert, at most ``budget`` per task, and write them to one file.

    In the place of ``budget``: ``total_budget`` for all tasks together, shared out by what each needs, or ``target``,
    the share of held-out inputs (the last quarter of each task's ``inputs``, task name to path) on which a recovered
    expert is to give the expert's own answer, in the smallest file that does. ``model`` and ``batch_size`` say how
    inputs are run. ``refine`` trains the offsets on the first 256 of each task's ``inputs``, by which it shares
    ``total_budget`` out, too. ``without`` names parts that are left out (``commands/fit_parts.py``). ``lossless`` adds
    an exact correction, so that recovery gives an expert's very bits. With none of the three the budget is 0.25%, or
    with ``lossless`` the one at which offsets and correction are smallest together.
    ``base`` is needed only where an expert is a LoRA adapter. With ``add`` (task name to reference) or ``remove``, and
    no ``experts``, the file ``output`` is changed: tasks join it or leave it, and the others stay as they are.
    """
    from retex_cli.commands import change_offsets
    from retex_cli.commands import fit_offsets as command

    config = command.FitOffsetsConfig(
        merged=merged,
        experts=experts,
        output=output,
        budget=budget,
        base=base,
        device=device,
        threads=threads,
        overwrite=overwrite,
        add=add or {},
        remove=tuple(remove),
        lossless=lossless,
        total_budget=total_budget,
        target=target,
        inputs=inputs or {},
        model=model,
        batch_size=batch_size,
        refine=refine,
        without=frozenset(without),
        seed=seed,
    )
    if add or remove:
        return change_offsets.run(change_offsets.plan(config), progress or Silent())
    return command.run(command.plan(config), progress or Silent())


def build_signatures(
    merged: str,
    inputs: Mapping[str, str],
    output: str,
    *,
    preset: str = "default",
    base: str | None = None,
    model: str | None = None,
    samples: int | None = None,
    or_fewer: bool = False,
    max_length: int | None = None,
    batch_size: int = 32,
    device: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> BuildSignaturesReport:
    """Describe every task by ``samples`` of its unlabelled ``inputs`` (task name to path) and write one file.

    ``or_fewer``: a file that has fewer gives all it has.
    """
    from retex_cli.commands import build_signatures as command

    config = command.BuildSignaturesConfig(
        merged=merged,
        inputs=inputs,
        output=output,
        preset=preset,
        base=base,
        model=model,
        samples=samples,
        or_fewer=or_fewer,
        max_length=max_length,
        batch_size=batch_size,
        device=device,
        threads=threads,
        seed=seed,
        overwrite=overwrite,
    )
    return command.run(command.plan(config), progress or Silent())


def change_signatures(
    merged: str,
    signatures: str,
    *,
    add: Mapping[str, str] | None = None,
    remove: Sequence[str] = (),
    model: str | None = None,
    samples: int | None = None,
    or_fewer: bool = False,
    batch_size: int = 32,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> BuildSignaturesReport:
    """Let tasks join ``signatures`` from their own inputs alone (``add``: task name to path), and leave it."""
    from retex_cli.commands import change_signatures as command

    config = command.ChangeSignaturesConfig(
        merged=merged,
        signatures=signatures,
        add=add or {},
        remove=tuple(remove),
        model=model,
        samples=samples,
        or_fewer=or_fewer,
        batch_size=batch_size,
        device=device,
        threads=threads,
    )
    return command.run(command.plan(config), progress or Silent())


def recover(
    merged: str,
    offsets: str,
    output: str,
    *,
    task: str | None = None,
    signatures: str | None = None,
    input: Sequence[str] = (),
    mix: Mapping[str, float] | None = None,
    soft: bool = False,
    min_confidence: float | None = None,
    head: str | None = None,
    model: str | None = None,
    dtype: str | None = None,
    max_shard_size: int = 5_000_000_000,
    device: str = "auto",
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> RecoverReport:
    """Bring back one expert: by ``task``, by the task that ``input`` belongs to, or as a ``mix`` whose shares sum to 1.

    ``soft`` with an identified task mixes experts by how well they fit; ``head`` names whose head a mix gets. Raises
    GateMissed where the task is identified with a probability under ``min_confidence``, or as unknown.
    """
    from retex_cli.commands import recover as command

    config = command.RecoverConfig(
        merged=merged,
        offsets=offsets,
        signatures=signatures,
        output=output,
        task=task,
        input=tuple(input),
        mix=mix or {},
        soft=soft,
        min_confidence=min_confidence,
        head=head,
        model=model,
        dtype=dtype,
        max_shard_size=max_shard_size,
        device=device,
        threads=threads,
        overwrite=overwrite,
    )
    return command.run(command.plan(config), progress or Silent())


def evaluate(
    merged: str,
    offsets: str,
    experts: Mapping[str, str],
    tests: Mapping[str, str],
    *,
    signatures: str | None = None,
    base: str | None = None,
    model: str | None = None,
    output: str | None = None,
    picture: str | None = None,
    logits: str | None = None,
    protocols: Sequence[str] = ("K", "E", "H"),
    blend: bool = True,
    fail_under: str | None = None,
    batch_size: int = 64,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> EvalReport:
    """Score experts, merged and recovered models on ``tests`` (task name to labelled data) side by side.

    ``output`` keeps the report as JSON, ``picture`` draws which tasks are taken for which (SVG), ``logits`` keeps every
    model's logits. ``blend=False`` lets the nearest task's expert answer alone, however unsure that is. Raises
    GateMissed, which carries the report, where the scores lie under ``fail_under`` (``"99"`` or ``"worst=97,H=95"``,
    percent of the experts' accuracy).
    """
    from retex_cli.commands import eval as command

    config = command.EvalConfig(
        merged=merged,
        offsets=offsets,
        signatures=signatures,
        experts=experts,
        tests=tests,
        base=base,
        model=model,
        output=output,
        picture=picture,
        logits=logits,
        protocols=tuple(protocols),
        blend=blend,
        fail_under=fail_under,
        batch_size=batch_size,
        device=device,
        threads=threads,
    )
    return command.run(command.plan(config), progress or Silent())


def identify(
    merged: str,
    signatures: str,
    inputs: Sequence[str],
    *,
    batch: bool = False,
    model: str | None = None,
    batch_size: int = 64,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> IdentifyReport:
    """Tell which task each of ``inputs`` (texts, files, folders) belongs to, and how sure that is.

    With ``batch`` they share a task, and there is one answer. What cannot be used stands under ``bad`` in the report.
    """
    from retex_cli.commands import identify as command

    config = command.IdentifyConfig(
        merged=merged,
        signatures=signatures,
        inputs=tuple(inputs),
        batch=batch,
        model=model,
        batch_size=batch_size,
        device=device,
        threads=threads,
    )
    return command.run(command.plan(config), progress or Silent())


def inspect(path: str, *, progress: Progress | None = None) -> InspectReport:
    """Say what a checkpoint or an artefact holds and how it was made."""
    from retex_cli.commands import inspect as command

    return command.run(command.plan(command.InspectConfig(path=path)), progress or Silent())
