"""METHODS: every way to merge that retex knows, in one visible table. Imports no numerical library.

One row is one method: its name on the command line, its paper, its options with the paper's defaults, and the place of
the function that computes it (``"sparse:ties"`` is ``retex_cli.merging.sparse.ties``), imported when it is first used.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

from retex_cli.errors import UsageError
from retex_cli.merging.options import Option, Value, unknown_task


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the table.

    ``granularity`` says how much must be in memory at once: "element" a block of elements, "rows" blocks of rows and
    Gram matrices (and the tensor of every expert if it is wide), "tensor" the tensor of every expert.
    ``needs`` names the statistics of every task's inputs that a method reads, ``samples`` how many inputs are usual.
    ``survey`` is the place of an optional function that looks at all tensors before the first is merged (for thresholds
    over the whole model).
    """

    name: str
    title: str
    paper: str
    where: str
    options: tuple[Option, ...] = ()
    granularity: Literal["element", "rows", "tensor"] = "element"
    needs: Literal["nothing", "two experts", "grams", "fisher"] = "nothing"
    samples: int = 0
    survey: str = ""

    @property
    def needs_inputs(self) -> bool:
        """Whether something is measured on the tasks' inputs before the merge."""
        return self.needs in ("grams", "fisher")

    @property
    def link(self) -> str:
        """Where the paper is."""
        return f"https://arxiv.org/abs/{self.paper}" if self.paper[:4].isdigit() else self.paper

    def function(self) -> object:
        """The function that merges one tensor; importing it imports torch."""
        return _load(self.where)

    def survey_function(self) -> object | None:
        """The function that looks at every tensor first, or None."""
        return _load(self.survey) if self.survey else None

    def resolve(self, given: Mapping[str, object]) -> dict[str, Value]:
        """All options of this method: those ``given``, checked, and the paper's defaults for the others.

        Modifiers are among them only if one is given.
        """
        options = self.options + (MODIFIERS if any(o.name in given for o in MODIFIERS) else ())
        known = {option.name: option for option in options}
        for name in given:
            if name not in known:
                every = {*known, *(option.name for option in MODIFIERS)}
                raise UsageError(
                    f"method {self.name!r} has no option {name!r}",
                    suggest(name, every) or f"it takes {', '.join(known) or 'no options'}",
                )
        return {name: o.parse(given[name], self.name) if name in given else o.default for name, o in known.items()}


def _load(where: str) -> object:
    module, _, name = where.partition(":")
    return getattr(import_module(f"retex_cli.merging.{module}"), name)


def suggest(name: str, known: Collection[str]) -> str | None:
    """ "did you mean ...?" for the closest of ``known``, or None if nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else None


def find_method(name: str) -> Method:
    """The row called ``name``; ``UsageError`` with the closest names otherwise."""
    if name not in METHODS:
        raise UsageError(
            f"unknown merge method {name!r}", suggest(name, METHODS) or f"methods are {', '.join(METHODS)}"
        )
    return METHODS[name]


def check_tasks(method: Method, given: Iterable[Mapping[str, object]], tasks: Collection[str]) -> None:
    """Raise ``UsageError`` if an option gives a number to a task that is not among ``tasks``."""
    for options in given:
        found = unknown_task(method.resolve(options), tasks)
        if found:
            raise UsageError(
                f"option {found[0]!r} of method {method.name!r} names the task {found[1]!r}, which is not merged",
                suggest(found[1], tasks) or f"tasks are {', '.join(sorted(tasks))}",
            )


def overridden(name: str, pattern: str) -> bool:
    """Whether an override is meant for a tensor: its glob matches, or it is the name itself."""
    return name == pattern or (any(c in pattern for c in "*?[") and fnmatch.fnmatchcase(name, pattern))


def options_for(
    method: Method, name: str, options: Mapping[str, object], overrides: Mapping[str, Mapping[str, object]]
) -> dict[str, Value]:
    """The options with which tensor ``name`` is merged: overrides whose glob matches it apply in the order given."""
    given = dict(options)
    for pattern, extra in overrides.items():
        if overridden(name, pattern):
            given.update(extra)
    return method.resolve(given)


AUTO, VALIDATION = "auto", "validation"
"""Words for ``alpha``: chosen by agreement with the experts on held-out inputs, or on labelled validation data."""


def _alpha(default: float) -> Option:
    help = "how much of the merged task vector is added to the base"
    return Option("alpha", default, help, words=(AUTO, VALIDATION))


_INNER = ("ties", "task_arithmetic", "average", "dare", "dare_ties")
_SWITCH = ("auto", "on", "off")
_DENSITY = "share of each task vector's entries that is kept"
_WEIGHT = Option("weight", 1.0, "factor on each task vector", per_task=True)
_SUM = Option("normalise", False, "divide by the sum of the weights")
_MEAN = Option("normalise", True, "divide by the sum of the weights that agree")
_ELECT = "keep only what has the sign of the sum"
_CANCELLED = Option(
    "cancelled", "zero", "an entry whose sum is exactly 0 becomes 0, or is elected positive", choices=("zero", "plus")
)
_RESCALE = Option(
    "rescale",
    "share",
    "divide what is left by its chance to be kept, scale it to the L1 norm before, or do neither",
    choices=("share", "l1", "off"),
)


def _density(default: float, low: float = 0.0) -> Option:
    return Option("density", default, _DENSITY, low, 1.0, per_task=True)


_ROWS = (
    Method(
        "average",
        "Average of the experts",
        "2203.05482",
        "linear:average",
        (Option("weight", 1.0, "weight of each expert", per_task=True), Option("normalise", True, _SUM.help)),
    ),
    Method(
        "task_arithmetic",
        "Task arithmetic: base plus the scaled sum of task vectors",
        "2212.04089",
        "linear:task_arithmetic",
        (_alpha(0.4), _WEIGHT, _SUM),
    ),
    Method(
        "ties",
        "TIES: trim, elect signs, disjoint mean",
        "2306.01708",
        "sparse:ties",
        (
            _density(0.2),
            _alpha(1.0),
            Option("scope", "global", "where the largest entries are chosen", choices=("global", "tensor")),
            _WEIGHT,
            _MEAN,
            _CANCELLED,
        ),
        survey="sparse:ties_survey",
    ),
    Method(
        "dare",
        "DARE: drop entries at random, rescale, then task arithmetic",
        "2311.03099",
        "sparse:dare",
        (_density(0.1, 1e-6), _alpha(0.4), _WEIGHT, _SUM, _RESCALE),
    ),
    Method(
        "dare_ties",
        "DARE, then the sign election and disjoint mean of TIES",
        "2311.03099",
        "sparse:dare_ties",
        (_density(0.1, 1e-6), _alpha(1.0), _WEIGHT, _MEAN, _CANCELLED, _RESCALE),
    ),
    Method(
        "della",
        "DELLA: drop by rank of magnitude at random, rescale, elect signs, average",
        "2406.11617",
        "prune:della",
        (
            _density(0.7, 1e-6),
            Option(
                "window",
                0.14,
                "how much likelier the largest entry of a row is kept than the smallest",
                0.0,
                1.0,
                per_task=True,
            ),
            _alpha(1.1),
            _WEIGHT,
            Option("elect", True, _ELECT),
            _MEAN,
            _CANCELLED,
            _RESCALE,
        ),
    ),
    Method(
        "breadcrumbs",
        "Breadcrumbs: drop the smallest entries and the few largest, then task arithmetic",
        "2312.06795",
        "prune:breadcrumbs",
        (
            _density(0.15),
            Option("gamma", 0.006, "share of largest entries that is dropped", 0.0, 1.0, per_task=True),
            _alpha(0.2),
            _WEIGHT,
            Option("elect", False, _ELECT),
            _SUM,
            _CANCELLED,
        ),
    ),
    Method(
        "slerp",
        "Spherical interpolation between two experts",
        "https://doi.org/10.1145/325165.325242",
        "linear:slerp",
        (Option("t", 0.5, "0 is the first expert by name, 1 the second", 0.0, 1.0),),
        needs="two experts",
    ),
    Method(
        "model_stock",
        "Model Stock: between base and mean by the angle of task vectors",
        "2403.19522",
        "linear:model_stock",
        (Option("floor", 0.0, "smallest product of two norms that a cosine is divided by", 0.0),),
    ),
    Method(
        "sce",
        "SCE: select by variance, weigh by energy, erase minority signs",
        "2408.07990",
        "unify:sce",
        (
            Option("density", 0.1, "share of entries, those that differ most between tasks, that is merged", 0.0, 1.0),
            Option(
                "of",
                "all",
                "the entries that the share is taken of: those that differ at all, or all",
                choices=("all", "differing"),
            ),
            Option("floor", 0.0, "mean square of all task vectors below which every task weighs the same", 0.0),
            _CANCELLED,
        ),
    ),
    Method(
        "pcb",
        "PCB: balance the competition of parameters within and across tasks",
        "2410.02396",
        "balance:pcb",
        (
            Option("density", 0.1, "share of entries of each task with a weight above zero", 1e-6, 1.0),
            _alpha(1.0),
        ),
        survey="balance:pcb_survey",
    ),
    Method(
        "consensus",
        "Consensus: task arithmetic on what matters to several tasks (TALL masks)",
        "2405.07813",
        "unify:consensus",
        (
            Option("tall_lambda", 0.4, "how clearly an entry must matter to count for a task", 0.0),
            Option("agreement", 2, "to how many tasks an entry must matter", 0),
            _alpha(0.4),
        ),
    ),
    Method("emr", "EMR: elected sign, largest magnitude (the unified model)", "2405.17461", "unify:emr"),
    Method(
        "tsv_m",
        "TSV-M: orthogonal top singular vectors of every task",
        "2412.00081",
        "spectral:tsv_m",
        (_alpha(1.0),),
        "rows",
    ),
    Method(
        "iso_c",
        "Iso-C: task arithmetic with a flat spectrum",
        "2502.04959",
        "spectral:iso_c",
        (_alpha(1.0),),
        "rows",
    ),
    Method(
        "iso_cts",
        "Iso-CTS: flat spectrum over common and task-specific subspaces",
        "2502.04959",
        "spectral:iso_cts",
        (
            Option("common", 0.8, "share of the rank that the common subspace takes", 0.0, 1.0),
            _alpha(1.0),
        ),
        "rows",
    ),
    Method(
        "knots",
        "KnOTS: align LoRA task vectors in one basis, merge there",
        "2410.19735",
        "knots:knots",
        (
            Option("inner", "ties", "the method that merges in the basis", choices=_INNER),
            Option("density", 0.2, _DENSITY, 1e-6, 1.0),
            _alpha(0.6),
        ),
        "tensor",
    ),
    Method(
        "doge",
        "DOGE: a learned common correction outside the shared subspace, then task arithmetic",
        "2501.01230",
        "doge:doge",
        (
            Option("density", 0.3, _DENSITY, 1e-6, 1.0),
            Option("scale", 0.07, "norm that each task vector of a layer is scaled to", 0.0),
            Option("subspace", 6, "the rank is divided by this for the shared subspace", 1),
            Option("steps", 400, "steps of gradient descent", 0),
        ),
        "tensor",
        survey="doge:doge_survey",
    ),
    Method(
        "fisher",
        "Fisher-weighted mean",
        "2111.09832",
        "inputs:fisher",
        (
            Option("normalise", True, "divide each Fisher information by its norm"),
            Option("floor", 1e-6, "smallest weight", 0.0),
        ),
        needs="fisher",
        samples=64,
        survey="inputs:fisher_survey",
    ),
    Method(
        "regmean",
        "RegMean: the linear layers closest to every expert on its own inputs",
        "2212.09849",
        "inputs:regmean",
        (Option("shrink", 0.9, "factor on the off-diagonal entries of the Gram matrices", 0.0, 1.0),),
        "tensor",
        needs="grams",
        samples=256,
    ),
    Method(
        "esm",
        "ESM: essential subspaces of the outputs' shift",
        "2606.19164",
        "esm:esm",
        (
            Option("variant", "vision", "the published code that is followed", choices=("vision", "roberta")),
            _alpha(1.0),
            Option("eigenvalues", "auto", "weigh directions by their eigenvalues", choices=_SWITCH),
            Option("tasks", "auto", "scale tasks by their norm", choices=_SWITCH),
            Option("columns", "auto", "scale input dimensions by their norm", choices=_SWITCH),
            Option("layers", "auto", "scale blocks by their norm", choices=_SWITCH),
            Option("polar", "auto", "make the joined directions orthogonal", choices=_SWITCH),
        ),
        "tensor",
        needs="grams",
        samples=32,
        survey="esm:esm_survey",
    ),
)

MODIFIERS = (
    Option("lines", 0.0, "LiNeS (2410.17146): how much more the last block's task vector is scaled than the first's"),
    Option(
        "lines_alpha",
        "auto",
        "LiNeS: scale of the first block and of what is outside; auto as in the paper",
        words=("auto",),
    ),
)
"""Options that every method takes."""

METHODS: Mapping[str, Method] = {row.name: row for row in _ROWS}
