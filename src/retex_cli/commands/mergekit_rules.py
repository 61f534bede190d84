"""Which of mergekit's methods (0.1.5) is which of ours, and with which options ours gives the same tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

REQUIRED = None


@dataclass(frozen=True)
class Rule:
    """One of mergekit's methods as one of ours.

    ``shared`` and ``each``: mergekit's parameter, for all models or per model -> our option and mergekit's default
    (``REQUIRED`` where it has none). ``fixed`` are options that make ours compute as theirs; ``unused`` are parameters
    that mergekit reads without effect. ``inputs`` says whether the base is merged too.
    """

    method: str
    semantics: str
    fixed: Mapping[str, object] = field(default_factory=dict)
    shared: Mapping[str, tuple[str, float | bool | None]] = field(default_factory=dict)
    each: Mapping[str, tuple[str, float | None]] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    inputs: bool = False


def _arithmetic(
    method: str,
    semantics: str,
    fixed: Mapping[str, object],
    normalise: bool,
    rescale: bool = False,
    more: Mapping[str, tuple[str, float | None]] | None = None,
) -> Rule:
    """A method of mergekit's family: sparsify, weigh, perhaps elect signs, add up."""
    shared = {"lambda": ("alpha", 1.0), "normalize": ("normalise", normalise), "rescale": ("rescale", rescale)}
    each = {"weight": ("weight", REQUIRED), "density": ("density", 1.0), **(more or {})}
    return Rule(method, semantics, fixed, shared, each, ("int8_mask",))


_PLUS = {"cancelled": "plus"}
_ELECTED = "weights before the election, a sum of exactly 0 counts as positive"
_RANDOM = "scaled to the L1 norm before the drop, masks of retex's own (--seed)"
_GAMMA: Mapping[str, tuple[str, float | None]] = {"gamma": ("gamma", 0.01)}
_EPSILON: Mapping[str, tuple[str, float | None]] = {"epsilon": ("window", 0.15)}

RULES: Mapping[str, Rule] = {
    "linear": Rule(
        "average",
        "weights of the models themselves",
        shared={"normalize": ("normalise", True)},
        each={"weight": ("weight", REQUIRED)},
        inputs=True,
    ),
    "slerp": Rule(
        "slerp", "from base_model to the other model, per tensor", shared={"t": ("t", REQUIRED)}, inputs=True
    ),
    "task_arithmetic": Rule(
        "task_arithmetic",
        "a weight per model, not divided by their sum",
        shared={"lambda": ("alpha", 1.0), "normalize": ("normalise", False)},
        each={"weight": ("weight", REQUIRED)},
        unused=("int8_mask", "density", "rescale"),
    ),
    "ties": _arithmetic("ties", f"top-k per tensor, {_ELECTED}", {"scope": "tensor", **_PLUS}, True),
    "dare_linear": _arithmetic("dare", _RANDOM, {}, False, True),
    "dare_ties": _arithmetic("dare_ties", f"a sum of what agrees, {_ELECTED}, {_RANDOM}", _PLUS, False, True),
    "della": _arithmetic("della", f"{_ELECTED}, {_RANDOM}", {"elect": True, **_PLUS}, True, True, _EPSILON),
    "della_linear": _arithmetic("della", f"no election, {_RANDOM}", {"elect": False}, False, True, _EPSILON),
    "breadcrumbs": _arithmetic("breadcrumbs", "a weighted sum", {"elect": False}, False, more=_GAMMA),
    "breadcrumbs_ties": _arithmetic(
        "breadcrumbs", f"a sum of what agrees, {_ELECTED}", {"elect": True, **_PLUS}, False, more=_GAMMA
    ),
    "model_stock": Rule(
        "model_stock",
        "products of norms below 1e-6 taken for 1e-6",
        {"floor": 1e-6},
        {"filter_wise": ("filter_wise", False)},
    ),
    "sce": Rule(
        "sce",
        "the share is of entries that differ, equal weights below a mean square of 1e-6, sums of 0 count as positive",
        {"of": "differing", "floor": 1e-6, **_PLUS},
        {"select_topk": ("density", 1.0)},
        unused=("int8_mask",),
    ),
}
OTHERS = ("nuslerp", "multislerp", "karcher", "nearswap", "arcee_fusion", "passthrough", "ram", "ramplus_tl")
PARAMETERS = {name for rule in RULES.values() for name in (*rule.shared, *rule.each, *rule.unused)}
