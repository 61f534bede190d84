"""``retex identify``: which task is each of these inputs?"""

from __future__ import annotations

from dataclasses import dataclass

from retex_cli.commands.identifier import Identification, Identifier
from retex_cli.commands.report import Json, Table
from retex_cli.errors import UsageError
from retex_cli.progress import Progress


@dataclass(frozen=True)
class IdentifyConfig:
    """``inputs``: files or folders of inputs. ``model``: see ``models.network.Network``."""

    merged: str
    signatures: str
    inputs: tuple[str, ...]
    model: str | None = None
    device: str = "auto"
    threads: int | None = None


@dataclass(frozen=True)
class IdentifyPlan:
    """The request, checked."""

    config: IdentifyConfig

    def report(self) -> IdentifyReport:
        return IdentifyReport(())


@dataclass(frozen=True)
class IdentifyReport:
    """``{"inputs": [{"source", "task", "probability", "margin", "unknown", "embedding"}]}``."""

    inputs: tuple[Identification, ...]

    def to_json(self) -> Json:
        return {"inputs": [found.to_json() for found in self.inputs]}

    def tables(self) -> list[Table]:
        rows = [
            (
                found.source,
                f"unknown (nearest {found.task})" if found.unknown else found.task,
                f"{100 * found.probability:.1f} %",
                f"{found.margin:.3g}",
            )
            for found in self.inputs
        ]
        return [Table("task of each input", ("input", "task", "sure", "margin"), tuple(rows))]

    def lines(self) -> list[str]:
        return []


def plan(config: IdentifyConfig) -> IdentifyPlan:
    """UsageError where there is nothing to identify."""
    if not config.inputs:
        raise UsageError("nothing to identify", "give files of inputs: retex identify inputs.jsonl")
    return IdentifyPlan(config)


def run(plan: IdentifyPlan, progress: Progress) -> IdentifyReport:
    """One forward pass of the encoder an input."""
    config = plan.config
    identifier = Identifier.open(
        config.signatures, config.merged, config.device, progress, model=config.model, threads=config.threads
    )
    return IdentifyReport(tuple(identifier.identify(config.inputs, progress)))
