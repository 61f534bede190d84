"""Parts of a fit that may be left out: what ``retex fit-offsets --without`` takes."""

from __future__ import annotations

from collections.abc import Sequence

from retex_cli.errors import UsageError

PARTS = {
    "lead": "kept components are lengthened for those that are left out",
    "compare": "answers are compared with those of smaller fits and of merged weights, and the nearest are kept",
    "effects": "where nothing is normalised, bytes are shared out by effects on answers, too, if that is nearer",
    "statistics": "with --refine: statistics of BatchNorm are measured on the recovered network",
    "training": "with --refine: the recovered network learns the expert's features and answers",
    "shares": "with --refine: --total-budget is shared out again by how far answers are",
}
"""What each does where it is not left out; docs/log.md has what each gains."""
REFINING = ("statistics", "training", "shares")


def check_parts(without: Sequence[str], *, refine: bool) -> frozenset[str]:
    """UsageError for a part that there is not, and for one that is only there with ``refine``."""
    for name in without:
        if name not in PARTS:
            raise UsageError(f"--without {name}: there is no such part", f"one of {', '.join(PARTS)}")
        if name in REFINING and not refine:
            raise UsageError(f"--without {name}: that is a part of --refine", "add --refine, or leave it out")
    return frozenset(without)


def parts_recipe(without: Sequence[str]) -> dict[str, object]:
    """Nothing where nothing is left out."""
    return {"without": sorted(set(without))} if without else {}
