"""How long work tells whoever started it where it is. Imports nothing of ours."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the steps of one long job; the command line draws them, a library caller may ignore them."""

    def start(self, label: str, total: int) -> None:
        """A stage begins: ``total`` steps are to come."""

    def advance(self, steps: int = 1) -> None:
        """``steps`` more steps of the current stage are done."""

    def note(self, text: str) -> None:
        """One line that a person should read: a fallback, a warning, a default that was chosen."""


class Silent:
    """Progress that nobody watches."""

    def start(self, label: str, total: int) -> None:
        pass

    def advance(self, steps: int = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class Part:
    """Progress of a part of a longer job, one of whose ``steps`` counts ``weight`` there."""

    def __init__(self, progress: Progress, weight: int, steps: int) -> None:
        self._progress, self._weight, self._left = progress, weight, steps

    def start(self, label: str, total: int) -> None:
        pass

    def advance(self, steps: int = 1) -> None:
        self._left -= steps
        self._progress.advance(self._weight * steps)

    def finish(self) -> None:
        """Advance by the steps that turned out not to be needed."""
        self.advance(self._left)

    def note(self, text: str) -> None:
        self._progress.note(text)
