"""What a person types and sees: one signature per command, one place for output, one for errors."""

from retex_cli.cli.app import main

__all__ = ["main"]
