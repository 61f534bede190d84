"""The one place that turns an error into words and an exit status.

0 done; 1 failed, with one clear line and a hint; 2 wrong usage; 3 a gate of the caller's was missed; 130 interrupted.
Anything that is none of ours and none of the operating system's is a bug and keeps its traceback.
"""

from __future__ import annotations

import errno
import sys
import traceback
from dataclasses import dataclass

from typer import Abort, TyperException

from retex_cli.cli.output import note, show_json_line
from retex_cli.errors import RetexError

FAILED, USAGE, INTERRUPTED = 1, 2, 130


@dataclass(frozen=True)
class Failure:
    """What a person, or the object of ``--json``, is told."""

    error: str
    hint: str | None
    code: int

    def to_json(self) -> dict[str, object]:
        """``{"error", "hint", "code"}``."""
        return {"error": self.error, "hint": self.hint, "code": self.code}

    def say(self) -> None:
        """One line, and one for the hint."""
        note(f"error: {self.error}")
        if self.hint:
            note(f"hint: {self.hint}")


def describe(error: BaseException) -> Failure | None:
    """The failure in words; None if the error is a bug."""
    if isinstance(error, RetexError):
        return Failure(_one_line(error.message), error.hint and _one_line(error.hint), error.exit_status)
    if isinstance(error, TyperException):
        return _usage(error)
    if isinstance(error, (KeyboardInterrupt, Abort)):
        return Failure("interrupted", None, INTERRUPTED)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return Failure("out of memory", "try --max-memory, --batch-size or --device cpu where the command has them", 1)
    if isinstance(error, OSError) and error.strerror:
        return _system(error)
    return None


def explain(error: BaseException, *, as_json: bool, debug: bool) -> int:
    """Say what went wrong, on standard error or as the object of ``--json``; return the exit status."""
    failure = describe(error)
    if debug or failure is None:
        traceback.print_exception(error, file=sys.stderr)
    if failure is None:
        summary = _one_line(f"{type(error).__name__}: {error}")
        failure = Failure(summary, "this is a bug in retex: please report it with the lines above", FAILED)
    if as_json:
        show_json_line(failure.to_json())
    else:
        failure.say()
    return failure.code


def _usage(error: TyperException) -> Failure:
    """A parse error; the parser's own classes are private, so its context is read by attribute."""
    context = getattr(error, "ctx", None)
    command = getattr(context, "command_path", "retex")
    option = getattr(error, "option_name", None)
    hint = f"{command} --help"
    if command == "retex" and isinstance(option, str) and option.startswith("--"):
        hint = f"options come after the command; {hint} lists the commands"
    return Failure(_one_line(error.format_message()).replace("Value error, ", ""), hint, USAGE)


def _system(error: OSError) -> Failure:
    place = f"{error.filename}: " if error.filename else ""
    hint = None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "free some space or write elsewhere with -o; what was there before is untouched"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        hint = "check who may read and write there"
    return Failure(_one_line(f"{place}{error.strerror}"), hint, FAILED)


def _one_line(text: str) -> str:
    return " ".join(text.split())
