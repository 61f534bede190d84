"""From scores to a probability that is right as often as it says, and to "none of these" at a stated rate.

Everything here is fitted on leave-one-out scores of the reference inputs, whose only label is the task they came with.

Probability: softmax of ``-score / temperature`` (temperature scaling, arXiv 1706.04599; see ``fit_temperature``).

Unknown inputs: two signs, each turned into ``-log p`` where p is the share of reference inputs that look at least as
strange, and summed (Fisher's method). One is the distance under the identified task's own covariance, standardised per
task by median and median absolute deviation; the other the entropy of the task probabilities, which catches inputs
that lie between tasks. Only the first grows without bound, so beyond the largest references the tail is continued
exponentially: an input far from everything is unknown even where the probabilities are sure of themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

TAIL = 0.05
"""Share of the reference values that shapes the continued tail."""

SMALLEST_SPREAD = 1e-3
"""Of distances within a task: Mahalanobis distances count dimensions, residuals are shares of a unit length."""

SMALLEST_EXCESS = 1e-2
"""Of a tail: where all references look the same, rounding must not look strange."""


def owners(counts: list[int]) -> torch.Tensor:
    """Task number of every row when tasks of these sizes stand one after another."""
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


def losses(scores: torch.Tensor, owner: torch.Tensor, temperature: float) -> torch.Tensor:
    """Per input [N] the cross-entropy in nats of ``softmax(-scores / temperature)`` with its own task."""
    return -torch.log_softmax(-scores / temperature, 1).gather(1, owner[:, None])[:, 0]


def fit_temperature(scores: torch.Tensor, owner: torch.Tensor) -> float:
    """The temperature at which inputs are as sure on average as they are right (expectation consistency, arXiv
    2303.02644): mean largest probability = (hits + 1) / (N + 2), as N inputs that are all right do not prove certainty.

    Least cross-entropy agrees with it where tasks overlap; where they do not, one far task among near ones would decide
    it. 1 for a single task, where nothing depends on it.
    """
    if scores.shape[1] == 1:
        return 1.0
    hits = int((scores.argmin(1) == owner).sum())
    wanted = (hits + 1) / (len(scores) + 2)
    spread = float((scores - scores.amin(1, keepdim=True)).mean())
    middle = math.log(max(spread, 1e-12))
    low, high = middle - 20.0, middle + 10.0
    for _ in range(48):
        half = (low + high) / 2
        sure = float(torch.softmax(-scores / math.exp(half), 1).amax(1).mean())
        low, high = (half, high) if sure > wanted else (low, half)
    return math.exp((low + high) / 2)


def entropy(scores: torch.Tensor, temperature: float) -> torch.Tensor:
    """Entropy [m] in nats of the task probabilities."""
    logs = torch.log_softmax(-scores.double() / temperature, 1)
    return -(logs.exp() * logs).sum(1).clamp(max=0)


def location_and_spread(values: torch.Tensor) -> tuple[float, float]:
    """Median and median absolute deviation (times 1.4826, so that it estimates a normal's standard deviation)."""
    middle = float(values.median())
    spread = 1.4826 * float((values - middle).abs().median())
    return middle, max(spread, SMALLEST_SPREAD)


@dataclass(frozen=True, slots=True)
class Tail:
    """``-log p`` of values among sorted reference ``values`` [N]: empirical, then exponential beyond the top 5 %."""

    values: torch.Tensor
    start: float
    excess: float
    at_start: float

    @classmethod
    def of(cls, values: torch.Tensor) -> Tail:
        """From reference values in any order."""
        ordered = values.double().sort().values
        count = len(ordered)
        top = min(max(math.ceil(TAIL * count), 5), max(count // 2, 1))
        start = ordered[count - top]
        excess = max(float((ordered[count - top :] - start).mean()), 0.05 * float(ordered[-1] - ordered[0]))
        excess = max(excess, SMALLEST_EXCESS)
        at_least = int((ordered >= start).sum())
        return cls(ordered, float(start), excess, -math.log((1 + at_least) / (count + 1)))

    def surprise(self, values: torch.Tensor) -> torch.Tensor:
        """``-log p`` [m] in nats of ``values`` [m]; zero where every reference is at least as large."""
        exact = values.double().contiguous()
        at_least = len(self.values) - torch.searchsorted(self.values, exact)
        body = -((1 + at_least.double()) / (len(self.values) + 1)).log()
        return torch.where(exact > self.start, self.at_start + (exact - self.start) / self.excess, body)


@dataclass(frozen=True, slots=True)
class Alarm:
    """When an input counts as unknown: a surprise above ``threshold``, ``expected`` of the time for known inputs.

    At least ``-log rate``, which one sign alone must reach: references that all look the same set no lower mark.
    ``expected`` is what N reference inputs can resolve, never below 1 / (N + 1); ``interval`` (95 %, Wilson) is what
    they say about the true rate.
    """

    threshold: float
    centre: float
    expected: float
    interval: tuple[float, float]

    @classmethod
    def of(cls, surprises: torch.Tensor, rate: float) -> Alarm:
        """From the surprises of N reference inputs, each judged without itself, and the wanted false-alarm rate."""
        ordered = surprises.double().sort().values
        count = len(ordered)
        kept = min(math.ceil((count + 1) * (1 - rate)), count)
        threshold = max(float(ordered[kept - 1]), -math.log(rate))
        above = int((ordered > threshold).sum())
        return cls(threshold, float(ordered.mean()), (above + 1) / (count + 1), wilson(above, count))

    def threshold_of_mean(self, count: int) -> float:
        """For the mean surprise of ``count`` inputs that share a task.

        The spread of a mean shrinks with the square root of ``count``; no further than to a quarter of the single
        input's, as a task's inputs also drift together.
        """
        return self.centre + (self.threshold - self.centre) * max(1 / math.sqrt(count), 0.25)


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a rate seen ``hits`` times in ``count`` (Wilson 1927)."""
    z = 1.959964
    share = hits / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)
