"""``python -m retex_cli`` is ``retex``."""

from retex_cli.cli import main

main()
