"""Parts of a fit that may be left out: what ``retex fit-offsets --without`` takes."""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING

from retex_cli.errors import UsageError

if TYPE_CHECKING:  # the command line reads the names of parts, and must not wait for torch
    from retex_cli.commands.task_fit import Wish

PARTS = {
    "common": "what all tasks' offsets have in common, where it is most of them, is coded once or left out",
    "lead": "kept components are lengthened for those that are left out",
    "compare": "answers are compared with those of smaller fits and of merged weights, and worse ones go",
    "effects": "bytes are shared out by effects on answers with BatchNorm, and where nothing is normalised, if nearer",
    "statistics": "with --refine: statistics of BatchNorm are measured on the recovered network",
    "training": "with --refine: the recovered network learns the expert's features and answers",
    "shares": "with --refine: --total-budget is shared out again by how far answers are",
}
"""What each does where it is not left out; docs/log.md has what each gains."""
REFINING = ("statistics", "training", "shares")
GIVEN = ("common", "compare")
"""What is only done within a budget that is given."""


def check_parts(without: Set[str], wish: Wish, *, refine: bool) -> None:
    """UsageError for a part that there is not, and for one that a fit to this ``wish`` does not have."""
    for name in sorted(without):
        if name not in PARTS:
            raise UsageError(f"--without {name}: there is no such part", f"one of {', '.join(PARTS)}")
        if name in REFINING and not refine:
            raise UsageError(f"--without {name}: that is a part of --refine", "add --refine, or leave it out")
        if name == "shares" and wish.total is None:
            raise UsageError(f"--without {name}: that is a part of --total-budget", "give one, or leave it out")
        if wish.lossless or (wish.target is not None and name in GIVEN):
            kind = "--lossless" if wish.lossless else "--target"
            raise UsageError(f"--without {name}: a fit with {kind} does not have that part", "leave it out")


def parts_recipe(without: Set[str]) -> dict[str, object]:
    """Nothing where nothing is left out."""
    return {"without": sorted(without)} if without else {}
