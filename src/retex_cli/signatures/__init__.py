"""Signatures: what a few unlabelled inputs of each task say about which task an input belongs to.

Features come in as float [inputs, layers, width]; what runs the encoder is elsewhere.
"""

from retex_cli.signatures.fit import PRESETS, fit
from retex_cli.signatures.signatures import Decisions, Signatures

__all__ = ["PRESETS", "Decisions", "Signatures", "fit"]
