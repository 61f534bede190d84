"""What the offsets of several tasks have in common, their mean: coded once for all of them, or left out.

A plain average lies in the middle of its experts, so there the mean is zero. Other merges lie elsewhere, some so far
that the way back to the middle, the same for every task, is most of every offset. To code it in each of them is to pay
for it again and again, and answers hardly hang on it: what they hang on is how a task differs from the others. So a
task's own offsets are the way from the middle of all experts to its own, and the way to the middle takes a part of the
budget of all if that goes far. In ``delta_hat(e) = U diag(C e) V^T`` (ReTeX, arXiv 2606.26902) it is made of
components for which ``C`` has a one in the columns of all tasks that use them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from retex_cli.commands.offsets_file import layout_of
from retex_cli.commands.offsets_header import COMMON, TaskRecord, share_of
from retex_cli.commands.task_fit import TaskFit
from retex_cli.commands.weigher import Weigher
from retex_cli.io.checkpoint import Checkpoint
from retex_cli.io.scratch import Scratch, as_tensor
from retex_cli.io.tensors import check_request
from retex_cli.offsets.allocate import Floats
from retex_cli.offsets.batchnorm import weights
from retex_cli.offsets.domain import to_domain
from retex_cli.offsets.fit import LEAD, BudgetTooSmall, OffsetFitter
from retex_cli.offsets.predict import Predictor
from retex_cli.offsets.shares import share_out
from retex_cli.offsets.stream import Factors, decode
from retex_cli.parallel import ordered_map
from retex_cli.progress import Progress, Silent

PART = 0.3
"""Of the budget that the common part may take. An allocation by energy alone gives it nearly all."""
FAR = 0.6
"""Of its energy that this has to hold: to go less than that of the way to the middle is no better than to stay."""
LEAST = 0.75
"""Of the energy that has to be common. With less (TIES: 0.6 to 0.7) it gains on one suite and loses on another."""
MIDDLE = "/middle/"
"""Before the names of pieces that are put aside; no task's name has a slash."""


class Corrected(Checkpoint):
    """A merged checkpoint with the common part added: what tasks' own offsets are added to. Reads are float32."""

    def __init__(self, merged: Checkpoint, common: Mapping[str, Factors]) -> None:
        super().__init__(
            merged.reference,
            merged.weight_files(),
            folder=merged.folder,
            revision=merged.revision,
            config=merged.config,
        )
        self._merged, self._predictor = merged, Predictor({COMMON: common})

    def read(self, name: str) -> Tensor:
        """The whole tensor, the sum in float32; as it is stored where nothing is common."""
        return self._predictor.add_to(name, self._merged.read(name), {COMMON: 1.0}, torch.device("cpu"))

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """A part of what ``read`` gives."""
        check_request(self.tensors[self.aliases.get(name, name)], start, out)
        out.copy_(self.read(name).reshape(-1)[start : start + out.numel()])


Middle = Callable[[str], Tensor]


@dataclass(frozen=True)
class Common:
    """The coded common part of ``tasks`` offsets, empty where they have none. ``middle``: the mean of their experts, by
    the names of merged matrices; None where that is not what their own offsets start from."""

    data: bytes
    tasks: int
    middle: Middle | None = None

    def over(self, merged: Checkpoint) -> Checkpoint:
        """What the tasks' own offsets are added to."""
        return Corrected(merged, decode(self.data, layout_of(merged))) if self.data else merged

    @property
    def share(self) -> int:
        """Bytes that count for each task, rounded up."""
        return -(-len(self.data) // self.tasks)

    def paid(self, fits: Sequence[TaskFit], *, together: bool) -> tuple[TaskFit, ...]:
        """The fits with what is left of their budgets, or, ``together``, of the one that they share."""
        part = len(self.data) if together else self.share
        return tuple(replace(fit, budget=fit.budget - part, common_bytes=part) for fit in fits) if part else tuple(fits)


def shared_out(
    rows: Mapping[str, Mapping[str, object]], records: Mapping[str, TaskRecord], nbytes: int
) -> dict[str, Mapping[str, object]]:
    """Rows of a report in which ``offset_bytes`` and ``budget_bytes`` of tasks that use a common part of ``nbytes``
    count an equal share of it."""
    share = share_of(records, nbytes)
    return {
        task: {**row, **{key: int(str(row[key])) + share for key in ("offset_bytes", "budget_bytes")}}
        if records[task].common
        else row
        for task, row in rows.items()
    }


def common_part(
    fits: Sequence[TaskFit], merged: Checkpoint, weigher: Weigher, device: torch.device, threads: int,
    scratch: Scratch, progress: Progress, *, together: bool, lead: float = LEAD,
) -> Common:  # fmt: skip
    """The common part of what ``fits`` are to recover, within its part of their budgets.

    ``together``: their budget is one that they share; ``lead``: see ``OffsetFitter``. Data-free; every expert is read
    once to find how much is common, and again only where it is enough.
    """
    mean = _Mean(fits, merged, weigher, device, threads, lead)
    found = scratch.get(COMMON)
    if found is None:
        budget = fits[0].budget if together else sum(fit.budget for fit in fits)
        data = mean.within(budget, progress)
        if data is not None:
            mean.put_aside(scratch)
        scratch.put(COMMON, {"data": as_tensor(data or b"")}, {} if data is None else {"middle": "put aside"})
        found = scratch.get(COMMON)
        assert found is not None, "it was put there just now"
    tensors, texts = found

    def middle(name: str) -> Tensor:
        piece = scratch.get(MIDDLE + name)
        return mean.middle(name) if piece is None else piece[0]["data"]

    return Common(tensors["data"].numpy().tobytes(), len(fits), middle if "middle" in texts else None)


@dataclass(frozen=True)
class _Mean:
    """The mean offset, tensor by tensor."""

    fits: Sequence[TaskFit]
    merged: Checkpoint
    weigher: Weigher
    device: torch.device
    threads: int
    lead: float

    def middle(self, name: str) -> Tensor:
        """A matrix of the merged checkpoint with its mean offset, float32, on the CPU."""
        return (self.merged.read(name).to(self.device) + self._mean(name)).cpu()

    def put_aside(self, scratch: Scratch) -> None:
        """The middle of every matrix, as each task needs it."""
        names = [name for name, shape in layout_of(self.merged) if len(shape) > 1]

        def put(name: str) -> None:
            scratch.put(MIDDLE + name, {"data": self.middle(name)})

        for _ in ordered_map(put, names, self.threads):
            pass

    def within(self, budget: int, progress: Progress) -> bytes | None:
        """Coded; empty for a budget that holds nothing of it, None where too little is common."""
        tasks = len(self.fits)
        share, typical = self._look(progress)
        if not share >= LEAST:  # a NaN is told by the fit of its task
            return None
        try:
            mean = self._fitter(self._mean, int(PART * budget), "fitting what offsets have in common", progress)
            own = self._fitter(
                lambda name: self._delta(typical, name) - self._mean(name),
                budget // tasks,
                "weighing it against a task's own",
                progress,
            )
            common = [replace(each, energies=tasks * each.energies) for each in mean.candidates()]
            by_energy = share_out([common, *[own.candidates()] * tasks], [0] * (tasks + 1), budget)[0]
            mean.budget = min(mean.budget, by_energy)
            kept = mean.components()
            held = 1 - mean.left_out(kept, mean.weights)
            data = mean.encode(kept) if held >= FAR else b""
        except BudgetTooSmall:
            held, data = 0.0, b""
        progress.note(
            f"{100 * share:.0f} % of the offsets' energy is common to them: "
            + (f"{100 * held:.0f} % of that is coded once, {len(data):,} bytes" if data else "it is left out")
        )
        return data

    def _look(self, progress: Progress) -> tuple[float, TaskFit]:
        """How much of all offsets' energy is common, and the task whose offsets have the median energy."""
        layout = layout_of(self.merged)
        names, counts = [name for name, _ in layout], weights(layout)
        progress.start("what offsets have in common", len(names))
        found = np.zeros(len(self.fits) + 1)
        for name, energies in zip(names, ordered_map(self._energies, names, self.threads), strict=True):
            found += counts.get(name, 1.0) * energies
            progress.advance()
        common, each = found[0], found[1:]
        typical = self.fits[int(np.argsort(each)[len(each) // 2])]
        return float(common / each.sum()) if each.any() else 0.0, typical

    def _counts(self, progress: Progress) -> dict[str, float]:
        """What an error counts, by tensor name: for all tasks together, and so in their mean."""
        if asking := sum(self.weigher.work(fit.task) for fit in self.fits):
            progress.start("asking networks what errors count", asking)
        found: dict[str, float] = {}
        for fit in self.fits:
            for name, count in self.weigher.of(fit, progress).weights.items():
                found[name] = found.get(name, 0.0) + count / len(self.fits)
        return found

    def _fitter(self, delta: Callable[[str], Tensor], budget: int, label: str, progress: Progress) -> OffsetFitter:
        """One that has seen the offset ``delta`` of every tensor."""
        layout = layout_of(self.merged)
        fitter = OffsetFitter(layout, budget, self._counts(progress), self.lead)

        def look(ranks: Mapping[str, int | None], watched: Progress) -> None:
            prepared = ordered_map(lambda name: fitter.prepare(delta(name), ranks[name]), ranks, self.threads)
            for name, each in zip(ranks, prepared, strict=True):
                fitter.update(name, each)
                watched.advance()

        progress.start(label, len(layout))
        look({name: None for name, _ in layout}, progress)
        while short := fitter.short():  # a few, quickly done
            look(short, Silent())
        return fitter

    def _energies(self, name: str) -> Floats:
        """float64 [1 + tasks]: squared norms of a tensor's mean offset, times the tasks, and of every task's."""
        total, each = self._sum(name)
        return np.array([_energy(total) / len(each), *each])

    def _mean(self, name: str) -> Tensor:
        """A tensor's mean offset, float32."""
        return self._sum(name)[0] / len(self.fits)

    def _sum(self, name: str) -> tuple[Tensor, list[float]]:
        """Of all tasks' offsets of a tensor, float32, and the squared norm of each."""
        merged = to_domain(name, self.merged.read(name).to(self.device))
        deltas = (self._from(merged, fit, name) for fit in self.fits)
        total = next(deltas)
        each = [_energy(total)]
        for delta in deltas:
            total, each = total.add_(delta), [*each, _energy(delta)]
        return total, each

    def _delta(self, fit: TaskFit, name: str) -> Tensor:
        """A task's offset of a tensor, float32; zeros where it has none."""
        return self._from(to_domain(name, self.merged.read(name).to(self.device)), fit, name)

    def _from(self, merged: Tensor, fit: TaskFit, name: str) -> Tensor:
        """``_delta``, with the merged tensor at hand."""
        if name not in fit.alignment.shared:
            return torch.zeros_like(merged)
        expert = fit.shared_part(name, fit.expert.read(fit.alignment.shared[name]))
        return to_domain(name, expert.to(self.device)) - merged


def _energy(delta: Tensor) -> float:
    """The squared norm, row by row: as exact as float64 of every entry, and a tenth of the time."""
    rows = delta.flatten(1) if delta.ndim > 1 else delta
    return float(torch.linalg.vector_norm(rows, dim=-1).double().square().sum())
