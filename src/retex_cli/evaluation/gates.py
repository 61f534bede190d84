"""Thresholds a caller sets on an evaluation: ``99``, ``worst=97``, ``K=99,H=95``; percent of the experts' accuracy."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from retex_cli.errors import UsageError
from retex_cli.evaluation.protocols import PROTOCOLS

NAMES = (*PROTOCOLS, "worst")


def parse_gates(text: str) -> dict[str, float]:
    """Percent by name; a bare number is the mean normalised accuracy under K. UsageError for anything else."""
    gates: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.rpartition("=")
        name = name or "K"
        try:
            gates[name] = float(value)
        except ValueError:
            raise UsageError(f"--fail-under: {part!r} is not a number", "for example 99 or worst=97,H=95") from None
        if name not in NAMES:
            raise UsageError(f"--fail-under: unknown name {name!r}", f"one of {', '.join(NAMES)}")
    if not gates:
        raise UsageError("--fail-under is empty", "for example 99 or worst=97,H=95")
    return gates


def check_gates(gates: Mapping[str, float], protocols: Collection[str]) -> None:
    """UsageError for a gate on a protocol that will not be run; ``worst`` is the worst task under K."""
    for name in gates:
        protocol = "K" if name == "worst" else name
        if protocol not in protocols:
            raise UsageError(f"--fail-under {name}: protocol {protocol} is not run", "add it to --protocols")


def missed_gates(gates: Mapping[str, float], normalised: Mapping[str, float], worst: float) -> list[str]:
    """A sentence for each gate that the evaluation does not reach; ``normalised`` and ``worst`` are fractions."""
    missed = []
    for name, threshold in gates.items():
        value = 100 * (worst if name == "worst" else normalised[name])
        if value < threshold:
            what = "worst task under K" if name == "worst" else f"mean under {name}"
            missed.append(f"{what}: {value:.2f} % of the experts' accuracy, wanted {threshold:g} %")
    return missed
