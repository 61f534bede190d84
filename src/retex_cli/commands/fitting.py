"""Fitting experts one after another, tensors side by side; finished tensors lie on disk until the file is written."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor

from retex_cli.allocator import give_back_large
from retex_cli.commands.agreement import Agreement, Judge, reach
from retex_cli.commands.checks import of_tensor
from retex_cli.commands.common import Common
from retex_cli.commands.corrections import stored_name
from retex_cli.commands.guard import Fit, Guard
from retex_cli.commands.offsets_file import known, layout_of, read_files
from retex_cli.commands.offsets_header import TaskRecord, naming, usual_dtype
from retex_cli.commands.refine import Refiner
from retex_cli.commands.task_fit import SMALLEST, TaskFit
from retex_cli.commands.weigher import Weighed, Weigher
from retex_cli.errors import RetexError
from retex_cli.io.artefact import Stored, stored_in
from retex_cli.io.checkpoint import Checkpoint
from retex_cli.io.provenance import fingerprint, tensor_digest
from retex_cli.io.scratch import Scratch, as_tensor
from retex_cli.offsets import lossless
from retex_cli.offsets.batchnorm import EPSILON, folded, norms
from retex_cli.offsets.domain import to_domain
from retex_cli.offsets.fit import LEAD, BudgetTooSmall, OffsetFitter, Prepared
from retex_cli.offsets.fixed import prediction
from retex_cli.offsets.pieces import from_tensors, to_tensors
from retex_cli.offsets.shares import share_again, share_out
from retex_cli.offsets.stream import decode
from retex_cli.offsets.total import Noise
from retex_cli.parallel import ordered_map
from retex_cli.progress import Part, Progress, Silent

CODED = "/coded"
"""No task's name has a slash."""
SLOW = 30
"""A step through a network takes about as long as so many steps of a fit from weights alone."""


@dataclass(frozen=True)
class FittedTask:
    """All that an offsets file gets of one task. ``tensors`` by their names in the file, in the order they stand there;
    ``files``: its side files by SHA-256, wherever they will be found later; ``checks``: digests of its own tensors;
    ``kept``: see ``guard.Choice``."""

    record: TaskRecord
    tensors: Mapping[str, Tensor | Stored]
    files: Mapping[str, bytes]
    checks: Mapping[str, str]
    agreement: Agreement | None = None
    kept: Mapping[str, object] | None = None


@dataclass(frozen=True)
class _Piece:
    """One tensor of an expert: the SHA-256 of its data, and what was prepared of its offset if it has one."""

    digest: bytes
    prepared: Prepared | None = None
    noise: Noise | None = None


@dataclass(frozen=True)
class _Prepared:
    """A fitter that has seen every tensor of an expert, and the SHA-256 of those tensors."""

    fitter: OffsetFitter
    digests: Mapping[str, str]


@dataclass(frozen=True)
class Fitting:
    """How experts are fitted to ``merged``; what is held in memory follows the tensors at hand, not their number.

    ``weigher``: what says by how much errors count. ``together``: whether their budget is one that they share.
    ``judge``: what decides on the budget where a target is to be reached. ``refiner``: what trains the offsets on
    inputs, if anything does. ``guard``: what compares answers before anything is kept. ``without``: see ``fit_parts``.
    ``common``: what offsets have in common, which ``merged`` then has in it.
    """

    merged: Checkpoint
    device: torch.device
    threads: int
    scratch: Scratch
    progress: Progress
    weigher: Weigher
    together: bool = False
    judge: Judge | None = None
    refiner: Refiner | None = None
    guard: Guard | None = None
    without: frozenset[str] = frozenset()
    common: Common | None = None

    def fit(self, fits: Sequence[TaskFit]) -> Iterator[FittedTask]:
        """Task by task. RetexError for NaN in an expert, for a budget that holds nothing and for a target that is out
        of reach."""
        networks = SLOW * sum(self._network_steps(fit) for fit in fits)
        self.progress.start(f"fitting {len(fits)} tasks", sum(map(_work, fits)) + networks)
        self._code_all(fits)
        for fit in fits:
            yield self._task(fit)

    def _network_steps(self, fit: TaskFit) -> int:
        return self.weigher.work(fit.task) + (0 if self.refiner is None else self.refiner.work(fit.task))

    def _code_all(self, fits: Sequence[TaskFit]) -> None:
        """Every task's coded offsets are put aside; one is coded while the next is prepared."""
        give_back_large()
        missing = [fit for fit in fits if self.scratch.get(f"{CODED}/{fit.task}") is None]
        for fit in fits:
            if fit not in missing:
                self.progress.note(f"{fit.task}: coded before the fit was interrupted")
                steps = sum(_steps(fit, name) for name in fit.expert.tensors)
                self.progress.advance(steps + SLOW * self._network_steps(fit))
        jobs: Iterable[tuple[TaskFit, _Prepared]] = ((fit, self._prepare(fit)) for fit in missing)
        if self.together and missing:
            prepared = self._shared_budget(fits)
            jobs = [(fit, prepared[fit.task]) for fit in missing]
        if self.judge or self.refiner or self.guard:  # a network computes on threads of its own
            for job in jobs:
                self._code(*job)
            return
        for _ in ordered_map(lambda job: self._code(*job), jobs, self.threads if self.together else 1):
            pass

    def _task(self, fit: TaskFit) -> FittedTask:
        coded = self.scratch.get(f"{CODED}/{fit.task}")
        assert coded is not None, "it was put there just now"
        tensors, texts = coded
        data = tensors["data"].numpy().tobytes()
        digests = {name: bytes.fromhex(digest) for name, digest in json.loads(texts["digests"]).items()}
        corrections = self._corrections(fit, data) if fit.lossless else {}
        files = read_files(fit.expert.side_files())
        size = sum(stored.shape[0] for stored in corrections.values())
        record = _record(fit, data, int(texts["budget"]), size, files, digests, common="common" in texts)
        offsets = {f"offsets/{fit.task}": self.scratch.stored(f"{CODED}/{fit.task}", "data")}
        agreement = Agreement.from_json(json.loads(texts["agreement"])) if "agreement" in texts else None
        own = _task_tensors(fit)
        digests_of_own = {name: of_tensor(stored.read()) for name, stored in own.items()}
        kept = json.loads(texts["kept"]) if "kept" in texts else None
        return FittedTask(record, {**own, **offsets, **corrections}, known([files]), digests_of_own, agreement, kept)

    def _shared_budget(self, fits: Sequence[TaskFit]) -> dict[str, _Prepared]:
        """All tasks prepared, each with its share of the budget that they have together."""
        prepared = {fit.task: self._prepare(fit) for fit in fits}
        fitters = [each.fitter for each in prepared.values()]
        least, budget = [fitter.least() for fitter in fitters], fits[0].budget
        if sum(least) > budget:
            needed = sum(least) + fits[0].common_bytes
            raise RetexError(
                f"the budget {fits[0].asked!r} is {budget + fits[0].common_bytes:,} bytes; the least that holds "
                f"anything of every task is {needed:,} bytes",
                f"give --total-budget {needed} or more",
            )
        looking = True
        while looking:
            shares = share_out([fitter.candidates() for fitter in fitters], least, budget)
            looking = self._give(fits, fitters, shares)
        if self.refiner is not None and "shares" not in self.without:
            distances = [self.refiner.distance(fit, fitter) for fit, fitter in zip(fits, fitters, strict=True)]
            self._give(fits, fitters, share_again(shares, distances, least, budget))
        return prepared

    def _give(self, fits: Sequence[TaskFit], fitters: Sequence[OffsetFitter], shares: Sequence[int]) -> bool:
        """Every task its budget; whether further components were looked for."""
        looked = False
        for fit, fitter, share in zip(fits, fitters, shares, strict=True):
            fitter.budget = share
            looked |= self._look_further(fit, fitter)
        return looked

    def _fresh(self, fit: TaskFit, budget: int, weighted: Mapping[str, float]) -> bytes:
        """See ``guard.Fresh``. What was found for larger budgets is not used, so that the bits do not depend on it."""
        fitter = self._prepare(replace(fit, budget=budget), beside=True).fitter
        fitter.weights = dict(weighted)
        self._look_further(fit, fitter)
        return fitter.finish()

    def _prepare(self, fit: TaskFit, *, beside: bool = False) -> _Prepared:
        """One task, ready to be coded; ``beside`` a fit that counts in the progress, it does not."""
        layout, weighed = layout_of(self.merged), self._weighed(fit, beside=beside)
        if fit.lossless:  # what counts is how small the errors are
            fitter = OffsetFitter(layout, fit.budget, lead=0.0)
        else:
            fitter = OffsetFitter(layout, fit.budget, weighed.weights, lead_of(self.without))
        merged_names = {expert: name for name, expert in fit.alignment.shared.items()}
        names = list(fit.expert.tensors)
        digests, noises = {}, {}
        pieces = ordered_map(
            lambda name: self._piece(fit, name, merged_names.get(name), fitter), names, self.threads, len(names)
        )  # they wait on disk
        for name, piece in zip(names, pieces, strict=True):
            digests[name] = piece.digest.hex()
            if piece.prepared is not None:
                fitter.update(merged_names[name], piece.prepared)
            if piece.noise is not None:
                noises[merged_names[name]] = piece.noise
            if not beside:
                self.progress.advance(_steps(fit, name))
        self._look_further(fit, fitter)
        if fit.asked == SMALLEST:
            fitter.lower_budget(noises)
        if not fit.lossless:
            self._fold(fit, fitter, weighed.epsilons)
        return _Prepared(fitter, digests)

    def _weighed(self, fit: TaskFit, *, beside: bool) -> Weighed:
        if beside:
            return self.weigher.of(fit, Silent())
        asking = Part(self.progress, SLOW, self.weigher.work(fit.task))
        found = self.weigher.of(fit, asking)
        asking.finish()
        return found

    def _fold(self, fit: TaskFit, fitter: OffsetFitter, epsilons: Mapping[str, float]) -> None:
        """Tell the fitter what BatchNorm layers come down to; a correction would find little of the expert in it."""
        theirs = fit.alignment.shared
        for norm in norms(layout_of(self.merged)):
            if not all(name in theirs for name in norm.names):
                continue
            epsilon = epsilons.get(norm.variance, EPSILON)
            wanted = folded(norm, lambda name: fit.expert.read(theirs[name]), self.merged.read, epsilon)
            for name, value in wanted.values.items():
                delta = to_domain(name, value) - to_domain(name, self.merged.read(name))
                fitter.fold(name, fitter.prepare(delta), wanted.pivots.get(name))

    def _look_further(self, fit: TaskFit, fitter: OffsetFitter) -> bool:
        """Find more components where the budget would pay for more than were found; whether it did anywhere."""
        looked = False
        while short := fitter.short():
            looked = True

            def more(name: str, ranks: Mapping[str, int] = short) -> _Piece:
                return self._piece(fit, fit.alignment.shared[name], name, fitter, ranks[name])

            for name, piece in zip(short, ordered_map(more, short, self.threads, len(short)), strict=True):
                assert piece.prepared is not None, "it has components"
                fitter.update(name, piece.prepared)
        return looked

    def _code(self, fit: TaskFit, prepared: _Prepared) -> None:
        """Coded offsets, their budget in bytes and the SHA-256 of every tensor of the expert, put aside."""
        fitter, alone = prepared.fitter, False
        texts = {"digests": json.dumps(prepared.digests)}
        if self.judge is not None:
            found = reach(fit, fitter, self.judge)
            data, fitter.budget = found.data, found.budget
            texts["agreement"] = json.dumps(Agreement(found.score, len(self.judge.inputs[fit.task].rows)).to_json())
        else:
            training = Part(self.progress, SLOW, 0 if self.refiner is None else self.refiner.work(fit.task))
            with _budget_in_words(fit):
                data = fitter.finish() if self.refiner is None else self.refiner.refine(fit, fitter, training)
            if self.guard is not None:
                first = Fit(data, fitter.budget, fitter.weights)
                fresh, trimmed = partial(self._fresh, fit), partial(_trimmed, fitter)
                choice = self.guard.choose(fit, first, fresh, trimmed, self.progress)
                if choice is not None:
                    data, texts["kept"] = choice.data, json.dumps(choice.to_json())
                    alone = not choice.budget
            training.finish()
        texts["budget"] = str(fitter.budget)
        if self.common and self.common.data and not alone:
            texts["common"] = "used"
        self.scratch.put(f"{CODED}/{fit.task}", {"data": as_tensor(data)}, texts)
        if not self.together:  # what shares a budget is needed until all of it is coded
            self.scratch.drop(f"{fit.task}/")

    def _piece(
        self, fit: TaskFit, name: str, ours: str | None, fitter: OffsetFitter, rank: int | None = None
    ) -> _Piece:
        """What was put aside of a tensor, or what is made of it and put aside now; ``rank`` as for ``prepare``."""
        if rank is None:
            rank = 0 if ours is None else fitter.first_rank(self.merged.tensors[ours].shape)
        place = f"{fit.task}/{name}/{rank}"
        found = self.scratch.get(place)
        if found is None:
            piece = self._made(fit, name, ours, fitter, rank)
            texts = {"digest": piece.digest.hex()} | ({"noise": json.dumps(asdict(piece.noise))} if piece.noise else {})
            self.scratch.put(place, {} if piece.prepared is None else to_tensors(piece.prepared), texts)
            found = self.scratch.get(place)
            assert found is not None, "it was put there just now"
        tensors, texts = found
        noise = Noise(**json.loads(texts["noise"])) if "noise" in texts else None
        return _Piece(bytes.fromhex(texts["digest"]), from_tensors(tensors) if tensors else None, noise)

    def _made(self, fit: TaskFit, name: str, ours: str | None, fitter: OffsetFitter, rank: int) -> _Piece:
        tensor = fit.expert.read(name)
        digest = tensor_digest(tensor)
        if ours is None or not tensor.is_floating_point():
            return _Piece(digest)
        shared = fit.shared_part(ours, tensor)
        noisy = fit.asked == SMALLEST
        delta = to_domain(ours, shared.to(self.device, copy=noisy))  # float32 weights are not needed twice
        middle = self.common.middle if self.common and delta.ndim > 1 else None
        start = middle(ours) if middle else self.merged.read(ours)
        delta -= to_domain(ours, start.to(self.device))
        if not math.isfinite(float(delta.sum())) and not bool(
            delta.isfinite().all()
        ):  # a sum takes a third of the time
            raise RetexError(
                f"{fit.expert.tensors[name].file}: tensor {name!r} of task {fit.task!r} holds NaN or infinity",
                "repair the expert or leave it out",
            )
        noise = lossless.noise_of(shared, delta) if noisy else None
        return _Piece(digest, fitter.prepare(delta, rank), noise)

    def _corrections(self, fit: TaskFit, data: bytes) -> dict[str, Stored]:
        """What the expert's shared tensors are beyond what ``data``, the coded offsets, predicts; by name in the
        file."""
        factors = decode(data, layout_of(self.merged))
        names = [name for name, _ in layout_of(self.merged) if name in fit.alignment.shared]

        def correct(name: str) -> None:
            place = stored_name(fit.task, fit.alignment.shared[name])
            if self.scratch.get(place) is None:
                expert = fit.shared_part(name, fit.expert.read(fit.alignment.shared[name]))
                predicted = prediction(name, self.merged.read(name), factors.get(name), expert.dtype)
                self.scratch.put(place, {"data": as_tensor(lossless.encode(expert, predicted))})

        found = {}
        for name, _ in zip(names, ordered_map(correct, names, self.threads), strict=True):
            place = stored_name(fit.task, fit.alignment.shared[name])
            found[place] = self.scratch.stored(place, "data")
            self.progress.advance(_steps(fit, fit.alignment.shared[name]))
        return found


@contextmanager
def scratch_beside(output: str, recipe: Mapping[str, object], device: torch.device) -> Iterator[Scratch]:
    """Where finished tensors of one fit lie: found again by a fit of the same files with the same options.

    An interruption leaves them there; success and a refusal do not.
    """
    key = json.dumps([recipe, torch.__version__, device.type], sort_keys=True)
    scratch = Scratch(output, hashlib.sha256(key.encode()).hexdigest())
    try:
        yield scratch
    except RetexError:
        scratch.remove()
        raise
    scratch.remove()


def _trimmed(fitter: OffsetFitter, budget: int) -> bytes:
    """See ``guard.Trimmed``."""
    whole, fitter.budget = fitter.budget, budget
    try:
        return fitter.finish()
    finally:
        fitter.budget = whole


def lead_of(without: Set[str]) -> float:
    """What ``OffsetFitter`` gets where these parts are left out."""
    return 0.0 if "lead" in without else LEAD


def _steps(fit: TaskFit, name: str) -> int:
    """What an expert's tensor counts in the progress: large ones take as long as many small ones."""
    return 1 + fit.expert.tensors[name].numel // 100_000


def _work(fit: TaskFit) -> int:
    steps = sum(_steps(fit, name) for name in fit.expert.tensors)
    return steps + (sum(_steps(fit, name) for name in fit.alignment.shared.values()) if fit.lossless else 0)


@contextmanager
def _budget_in_words(fit: TaskFit) -> Iterator[None]:
    try:
        yield
    except BudgetTooSmall as error:
        needed = error.minimum + fit.common_bytes
        raise RetexError(
            f"the budget {fit.asked!r} is {fit.budget + fit.common_bytes:,} bytes for task {fit.task!r}; the least "
            f"that holds anything is {needed:,} bytes",
            f"give --budget {needed} or more",
        ) from error


def _task_tensors(fit: TaskFit) -> dict[str, Stored]:
    tensors = {f"tensors/{fit.task}/{name}": stored_in(fit.expert, name) for name in fit.alignment.task}
    for name in fit.alignment.rows:
        expert_name = fit.alignment.shared[name]
        tensors[f"rows/{fit.task}/{expert_name}"] = _extra_rows(fit, name, expert_name)
    return tensors


def _extra_rows(fit: TaskFit, name: str, expert_name: str) -> Stored:
    info, count = fit.expert.tensors[expert_name], fit.alignment.rows[name]
    shape = (info.shape[0] - count, *info.shape[1:])
    return Stored(info.dtype, shape, lambda: fit.expert.read(expert_name)[count:])


def _record(
    fit: TaskFit, data: bytes, budget: int, correction: int, files: Mapping[str, bytes], digests: Mapping[str, bytes],
    *, common: bool,
) -> TaskRecord:  # fmt: skip
    infos = fit.expert.tensors
    dtype, dtypes = usual_dtype({name: infos[name].dtype for name in fit.alignment.shared.values()})
    return TaskRecord(
        expert=fit.expert.reference,
        revision=fit.expert.revision,
        fingerprint=fingerprint({name: (info.dtype, info.shape, digests[name]) for name, info in infos.items()}),
        expert_bytes=sum(file.stat().st_size for file in fit.expert.files),
        offset_bytes=len(data),
        budget_bytes=budget,
        checksum=hashlib.sha256(data).hexdigest(),
        prefix=fit.alignment.prefix,
        names=naming(fit.alignment),
        absent=fit.alignment.kept,
        dtype=dtype,
        dtypes=dtypes,
        rows=fit.alignment.rows,
        files={name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        correction_bytes=correction,
        common=common,
    )
