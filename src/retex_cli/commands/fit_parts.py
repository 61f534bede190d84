"""Parts of a fit that may be left out: what ``retex fit-offsets --without`` takes."""

from __future__ import annotations

from collections.abc import Set

from retex_cli.errors import UsageError

PARTS = {
    "common": "what all tasks' offsets have in common, where it is most of them, is coded once or left out",
    "lead": "kept components are lengthened for those that are left out",
    "compare": "answers are compared with those of smaller fits and of merged weights, and worse ones go",
    "effects": "where nothing is normalised, bytes are shared out by effects on answers, too, if that is nearer",
    "statistics": "with --refine: statistics of BatchNorm are measured on the recovered network",
    "training": "with --refine: the recovered network learns the expert's features and answers",
    "shares": "with --refine: --total-budget is shared out again by how far answers are",
}
"""What each does where it is not left out; docs/log.md has what each gains."""
REFINING = ("statistics", "training", "shares")


def check_parts(without: Set[str], *, refine: bool) -> None:
    """UsageError for a part that there is not, and for one that is only there with ``refine``."""
    for name in sorted(without):
        if name not in PARTS:
            raise UsageError(f"--without {name}: there is no such part", f"one of {', '.join(PARTS)}")
        if name in REFINING and not refine:
            raise UsageError(f"--without {name}: that is a part of --refine", "add --refine, or leave it out")


def parts_recipe(without: Set[str]) -> dict[str, object]:
    """Nothing where nothing is left out."""
    return {"without": sorted(without)} if without else {}
