"""How far one network's answers are from another's."""

from __future__ import annotations

import torch
from torch import Tensor

SAME = 1e-12
"""Nearer than this, as a share of an answer's variance, answers are the same."""

EQUAL = 1e-6
"""Probabilities that diverge less are the same: float32 has hardly more."""

MOST = 1 << 16
"""Numbers of one answer that are compared: more, as a language model's, take memory and say nothing new."""


def thinned(answers: Tensor) -> Tensor:
    """Answers [n, …] as they are, or float32 [n, 1, k] with no more than ``MOST`` of each, evenly spaced."""
    every = -(-answers[0].numel() // MOST)
    return answers.float() if every <= 1 else answers.flatten(1)[:, None, ::every].float().contiguous()


def apart(found: Tensor, wanted: Tensor) -> Tensor:
    """Of every input: float32 [n], from ``SAME`` to its inverse, which is also what stands for no number.

    The squared error by the variance of the wanted answer, so that every input counts alike. Logits [n, classes] are
    compared but for what all classes have in common, which no probability depends on. (The divergence of probabilities
    itself orders fits well on a task's inputs and badly on inputs that are none of its kind, where a network is sure of
    whatever it says.) A single number per input has the variance over all inputs.
    """
    ours, theirs = found.float().flatten(1), wanted.float().flatten(1)
    if wanted.ndim == 2 and wanted.shape[1] > 1:
        ours = ours - ours.mean(1, keepdim=True)
    over = 1 if theirs.shape[1] > 1 else 0
    centred = theirs - theirs.mean(over, keepdim=True)
    wanted_part = centred if wanted.ndim == 2 and over else theirs
    spread = centred.square().sum(1) if over else centred.square().mean().expand(len(theirs))
    far = (ours - wanted_part).square().sum(1) / spread.clamp_min(1e-30)
    return far.nan_to_num(nan=torch.inf).clamp(SAME, 1 / SAME)


def diverged(found: Tensor, wanted: Tensor) -> Tensor:
    """Of every input: float32 [n], the divergence of its class probabilities from the wanted ones, logits [n, classes];
    of other answers as ``apart``.

    Training lessens it, and lets logits go of classes that are out of the question, which ``apart`` counts like others.
    """
    if wanted.ndim != 2 or wanted.shape[1] < 2:
        return apart(found, wanted)
    ours, theirs = found.float().log_softmax(-1), wanted.float().log_softmax(-1)
    far = (theirs.exp() * (theirs - ours)).sum(1)
    return far.nan_to_num(nan=torch.inf).clamp(EQUAL, 1 / EQUAL)
