"""What can go wrong, in words a person can act on. Imports nothing of ours.

Every error carries a message that names the place (file, tensor, task, both values) and, where there is one, a hint
that says what to do next. Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations


class RetexError(Exception):
    """A failure that the caller can understand: exit status 1."""

    exit_status = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(RetexError):
    """The request itself cannot be meant: an unknown name, a missing or contradictory option. Exit status 2."""

    exit_status = 2


class GateMissed(RetexError):
    """Everything worked and the caller's own threshold was missed: exit status 3."""

    exit_status = 3
