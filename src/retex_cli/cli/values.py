"""Text of the command line into values: sizes, NAME=VALUE pairs, shares, numbers. Every error names the option."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable

from retex_cli.errors import UsageError
from retex_cli.workspace import Workspace, check_task_name

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def size(text: str, option: str) -> int:
    """Bytes: ``5GB`` and ``600MB`` count in thousands, ``5GiB`` in 1024s, a bare number in bytes; above zero."""
    match = _SIZE.fullmatch(text.strip())
    number = 0 if match is None else float(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2].lower()]
    if int(number) < 1:
        raise UsageError(f"{option}: {text!r} is not a size", "write 5GB, 600MB, 512MiB or a number of bytes")
    return int(number)


def model_of(space: Workspace, flag: str | None) -> str | None:
    """The function that builds the network: the flag's, else the file's; a module beside the file can be imported."""
    model = flag or space.model
    folder = str(space.folder.resolve())
    if model is not None and folder not in sys.path:
        sys.path.insert(0, folder)
    return model


def pairs(items: Iterable[str] | None, option: str) -> dict[str, str]:
    """``NAME=VALUE`` of a repeatable option by task name; a name given twice is an error."""
    found: dict[str, str] = {}
    for item in items or ():
        name, sign, value = item.partition("=")
        if not sign or not value:
            raise UsageError(f"{option}: {item!r} is not NAME=VALUE", f"for example {option} cars=path/to/cars")
        if check_task_name(name, option) in found:
            raise UsageError(f"{option}: task {name!r} is given twice, as {found[name]!r} and {value!r}")
        found[name] = value
    return found


def shares(text: str | None, option: str) -> dict[str, float]:
    """``cars=0.7,dtd=0.3`` by task name."""
    found: dict[str, float] = {}
    for name, value in pairs(None if text is None else text.split(","), option).items():
        try:
            found[name] = float(value)
        except ValueError:
            raise UsageError(f"{option}: {value!r} is not a number", f"for example {option} cars=0.7,dtd=0.3") from None
    return found


def names(text: str | None) -> tuple[str, ...] | None:
    """A comma-separated list."""
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def scalar(text: str) -> object:
    """A number or truth value where the text reads as one, otherwise the text itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def per_task(items: Iterable[str] | None, option: str) -> object:
    """``0.5`` for every task, ``TASK=0.5`` for one, or several of them; None if nothing is given."""
    found: dict[str, object] = {}
    for item in items or ():
        name, sign, value = item.rpartition("=")
        if sign:
            check_task_name(name, option)
        if (name or "*") in found:
            whom = f"for task {name!r}" if name else "for all tasks"
            raise UsageError(f"{option} is given twice {whom}", f"for example {option} 0.5 {option} cars=0.7")
        found[name or "*"] = scalar(value)
    return found.get("*") if set(found) <= {"*"} else found


def settings(items: Iterable[str] | None, option: str) -> tuple[dict[str, object], dict[str, dict[str, object]]]:
    """``[GLOB:]NAME=VALUE`` into options for every parameter, and options by glob for those that match."""
    common: dict[str, object] = {}
    by_glob: dict[str, dict[str, object]] = {}
    for item in items or ():
        left, sign, value = item.partition("=")
        glob, _, name = left.rpartition(":")
        if not sign or not value or not name:
            raise UsageError(f"{option}: {item!r} is not [GLOB:]NAME=VALUE", f"for example {option} '*.bias:density=1'")
        (by_glob.setdefault(glob, {}) if glob else common)[name.replace("-", "_")] = scalar(value)
    return common, by_glob
