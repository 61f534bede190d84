"""Several networks, answering as one."""

from __future__ import annotations

import torch

from retex_cli.models.classifier import Heard, likeliest


def heard(labels: str, probabilities: list[float], share: float) -> Heard:
    return Heard(tuple(labels), torch.tensor(probabilities).log() + 3, share)


def test_shares_count_and_the_loudest_is_named() -> None:
    doubtful, sure = heard("xy", [0.45, 0.55], 0.6), heard("xy", [0.9, 0.1], 0.4)
    assert likeliest({"a": doubtful, "b": sure}) == ("x", "b")
    assert likeliest({"a": doubtful, "b": sure._replace(share=0.05)}) == ("y", "a")


def test_labels_of_one_name_are_one_label() -> None:
    """x has 0.18 and 0.21 of two networks, more than any label has of one."""
    one, other, third = heard("xy", [0.6, 0.4], 0.3), heard("zx", [0.4, 0.6], 0.35), heard("wv", [0.9, 0.1], 0.35)
    assert likeliest({"a": one, "b": other, "c": third}) == ("x", "b")
    assert likeliest({"a": one, "b": other._replace(labels=("z", "u")), "c": third}) == ("w", "c")


def test_a_single_network_answers_by_its_largest_logit() -> None:
    saturated = Heard(("x", "y"), torch.tensor([900.0, 901.0]), 1.0)
    assert likeliest({"a": saturated}) == ("y", "a")
