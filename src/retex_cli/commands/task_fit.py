"""One expert's part of an offsets file: how it lies over the merged checkpoint, its fit, and what is stored of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from retex_cli.commands.budget import budget_bytes
from retex_cli.commands.corrections import stored_name
from retex_cli.commands.offsets_file import TaskRecord, known, layout_of, naming, read_files, usual_dtype
from retex_cli.errors import RetexError
from retex_cli.io.align import Alignment, align
from retex_cli.io.checkpoint import Checkpoint, open_checkpoint, open_expert
from retex_cli.io.digests import sha256_file
from retex_cli.io.provenance import fingerprint, tensor_digest
from retex_cli.offsets import lossless
from retex_cli.offsets.domain import to_domain
from retex_cli.offsets.fit import BudgetTooSmall, OffsetFitter, Prepared
from retex_cli.offsets.fixed import prediction
from retex_cli.offsets.stream import decode
from retex_cli.offsets.total import Noise
from retex_cli.parallel import ordered_map
from retex_cli.progress import Progress

DEFAULT = "0.25%"
SMALLEST = "smallest total"
"""The budget of a lossless fit where none is typed: offsets and correction are smallest together."""
MOST = "8%"
"""And the most that its offsets may take of it."""


@dataclass(frozen=True)
class TaskFit:
    """One expert and how its tensors lie over the merged ones; ``budget`` as it was typed and in bytes, a limit only
    where the fit is to choose it (``asked`` is ``SMALLEST``)."""

    task: str
    expert: Checkpoint
    alignment: Alignment
    asked: str
    budget: int
    lossless: bool = False

    @property
    def most_bytes(self) -> int:
        """What the file needs for the task at most, side files apart."""
        return self.budget + self.task_tensor_bytes + (self.expert.nbytes if self.lossless else 0)

    @property
    def task_tensor_bytes(self) -> int:
        """Bytes of what is stored verbatim: task tensors and rows beyond the merged checkpoint's."""
        whole = sum(self.expert.tensors[name].nbytes for name in self.alignment.task)
        return whole + sum(map(self._extra_rows_bytes, self.alignment.rows))

    def _extra_rows_bytes(self, name: str) -> int:
        info = self.expert.tensors[self.alignment.shared[name]]
        return info.nbytes - info.nbytes // info.shape[0] * self.alignment.rows[name]

    def row(self) -> dict[str, object]:
        """What a plan can say of the task in the report."""
        return {
            "expert": self.expert.reference,
            "budget_bytes": self.budget,
            "task_tensor_bytes": self.task_tensor_bytes,
            "expert_bytes": self.expert.nbytes,
        }

    def recipe(self) -> dict[str, object]:
        """Where the expert came from, by hash."""
        return {
            "reference": self.expert.reference,
            "revision": self.expert.revision,
            "files": file_hashes(self.expert),
        }


@dataclass(frozen=True)
class FittedTask:
    """All that an offsets file gets of one task. ``tensors`` by their names in the file; ``files``: its side files by
    SHA-256, wherever they will be found later."""

    record: TaskRecord
    tensors: Mapping[str, Tensor]
    files: Mapping[str, bytes]


def file_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 of every weight file, by name."""
    return {file.name: sha256_file(file) for file in checkpoint.files}


def asked_budget(budget: str | None, exact: bool) -> str:
    """The budget in words, where none was typed, too."""
    return budget or (SMALLEST if exact else DEFAULT)


def match_experts(
    experts: Mapping[str, str], merged: Checkpoint, base: str | None, budget: str | None, exact: bool
) -> tuple[TaskFit, ...]:
    """Open every expert by its headers and match it to ``merged``, in the order of task names.

    RetexError for an expert of another shape, and for one that shares nothing; ``base`` is what adapters apply to,
    ``exact`` whether they are to come back bit for bit.
    """
    floating = [name for name, _ in layout_of(merged)]
    opened = open_checkpoint(base) if base else None
    fits = []
    for task in sorted(experts):
        reference = experts[task]
        expert = open_checkpoint(reference) if opened is None else open_expert(reference, opened)
        alignment = align(merged, expert, allow_missing=("*",))
        if not alignment.shared:
            raise RetexError(
                f"{reference}: shares no tensor with {merged.reference}", "was it merged into that checkpoint?"
            )
        numel = sum(merged.tensors[name].numel for name in floating if name in alignment.shared)
        asked = asked_budget(budget, exact)
        size = budget_bytes(MOST if asked == SMALLEST else asked, numel)
        fits.append(TaskFit(task, expert, alignment, asked, size, exact))
    return tuple(fits)


def fit_task(fit: TaskFit, merged: Checkpoint, device: torch.device, threads: int, progress: Progress) -> FittedTask:
    """Fit one task, tensors side by side; the correction of a lossless one is held in memory until it is written."""
    data, budget, digests = _fit_offsets(fit, merged, device, threads, progress)
    corrections = _corrections(fit, merged, data, threads, progress) if fit.lossless else {}
    files = read_files(fit.expert.side_files())
    tensors = {**_task_tensors(fit), f"offsets/{fit.task}": as_tensor(data), **corrections}
    record = _record(fit, data, files, digests)
    size = sum(tensor.numel() for tensor in corrections.values())
    return FittedTask(replace(record, budget_bytes=budget, correction_bytes=size), tensors, known([files]))


def _shared(fit: TaskFit, name: str, expert: Tensor) -> Tensor:
    """The part of an expert's tensor that lies over the merged tensor ``name``."""
    return expert[: fit.alignment.rows[name]] if name in fit.alignment.rows else expert


def _fit_offsets(
    fit: TaskFit, merged: Checkpoint, device: torch.device, threads: int, progress: Progress
) -> tuple[bytes, int, dict[str, bytes]]:
    """Coded offsets, their budget in bytes, and the SHA-256 of every tensor of the expert."""
    fitter = OffsetFitter(layout_of(merged), fit.budget)
    merged_names = {expert: name for name, expert in fit.alignment.shared.items()}
    names = list(fit.expert.tensors)
    smallest = fit.asked == SMALLEST
    progress.start(f"fitting {fit.task}", len(names))

    def prepare(name: str) -> tuple[bytes, Prepared | None, Noise | None]:
        tensor = fit.expert.read(name)
        digest = tensor_digest(tensor)
        if name not in merged_names or not tensor.is_floating_point():
            return digest, None, None
        ours = merged_names[name]
        shared = _shared(fit, ours, tensor)
        delta = to_domain(ours, shared.to(device)) - to_domain(ours, merged.read(ours).to(device))
        if not bool(delta.isfinite().all()):
            raise RetexError(
                f"{fit.expert.tensors[name].file}: tensor {name!r} of task {fit.task!r} holds NaN or infinity",
                "repair the expert or leave it out",
            )
        return digest, fitter.prepare(delta), lossless.noise_of(shared, delta) if smallest else None

    digests, noises = {}, {}
    for name, (digest, prepared, noise) in zip(names, ordered_map(prepare, names, threads), strict=True):
        digests[name] = digest
        if prepared is not None:
            fitter.update(merged_names[name], prepared)
        if noise is not None:
            noises[merged_names[name]] = noise
        progress.advance()
    if smallest:
        fitter.lower_budget(noises)
    try:
        return fitter.finish(), fitter.budget, digests
    except BudgetTooSmall as error:
        raise RetexError(
            f"the budget {fit.asked!r} is {fit.budget:,} bytes for task {fit.task!r}; the least that holds "
            f"anything is {error.minimum:,} bytes",
            f"give --budget {error.minimum} or more",
        ) from error


def _corrections(fit: TaskFit, merged: Checkpoint, data: bytes, threads: int, progress: Progress) -> dict[str, Tensor]:
    """What the expert's shared tensors are beyond what ``data``, the coded offsets, predicts; by name in the file."""
    factors = decode(data, layout_of(merged))
    names = [name for name, _ in layout_of(merged) if name in fit.alignment.shared]
    progress.start(f"correcting {fit.task}", len(names))

    def correct(name: str) -> bytes:
        expert = _shared(fit, name, fit.expert.read(fit.alignment.shared[name]))
        return lossless.encode(expert, prediction(name, merged.read(name), factors.get(name), expert.dtype))

    found = {}
    for name, correction in zip(names, ordered_map(correct, names, threads), strict=True):
        found[stored_name(fit.task, fit.alignment.shared[name])] = as_tensor(correction)
        progress.advance()
    return found


def as_tensor(data: bytes) -> Tensor:
    """uint8 [bytes]."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _task_tensors(fit: TaskFit) -> dict[str, Tensor]:
    tensors = {f"tensors/{fit.task}/{name}": fit.expert.read(name) for name in fit.alignment.task}
    for name, count in fit.alignment.rows.items():
        expert_name = fit.alignment.shared[name]
        tensors[f"rows/{fit.task}/{expert_name}"] = fit.expert.read(expert_name)[count:].clone()
    return tensors


def _record(fit: TaskFit, data: bytes, files: Mapping[str, bytes], digests: Mapping[str, bytes]) -> TaskRecord:
    infos = fit.expert.tensors
    dtype, dtypes = usual_dtype({name: infos[name].dtype for name in fit.alignment.shared.values()})
    return TaskRecord(
        expert=fit.expert.reference,
        revision=fit.expert.revision,
        fingerprint=fingerprint({name: (info.dtype, info.shape, digests[name]) for name, info in infos.items()}),
        expert_bytes=sum(file.stat().st_size for file in fit.expert.files),
        offset_bytes=len(data),
        budget_bytes=fit.budget,
        checksum=hashlib.sha256(data).hexdigest(),
        prefix=fit.alignment.prefix,
        names=naming(fit.alignment),
        absent=fit.alignment.kept,
        dtype=dtype,
        dtypes=dtypes,
        rows=fit.alignment.rows,
        files={name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    )
