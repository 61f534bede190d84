"""A network that answers with one label per input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from retex_cli.errors import RetexError
from retex_cli.io.inputs import Example
from retex_cli.models.network import Network
from retex_cli.models.passes import Passed, run
from retex_cli.models.processor import Inputs
from retex_cli.progress import Progress


def classify(
    network: Network, examples: Sequence[Example], batch_size: int, threads: int, progress: Progress
) -> Tensor:
    """Float32 [n, classes] on the CPU, in the order of ``examples``. Advances progress by one an example.

    RetexError where the network has not one logit per label of its ``config.json``, and for the first input that it
    cannot take.
    """
    return answer(network, examples, batch_size, threads, progress).whole()


def answer(network: Network, examples: Sequence[Example], batch_size: int, threads: int, progress: Progress) -> Passed:
    """``classify`` of the inputs that the network can take."""

    def forward(inputs: Inputs) -> Tensor:
        with network.inference():
            logits = network.logits(inputs).cpu()
        if logits.shape[1] != len(network.labels):
            raise RetexError(
                f"{network.name}: config.json names {len(network.labels)} labels, "
                f"the network gives {logits.shape[1]} logits",
                "name every class under id2label",
            )
        return logits

    return run(network, examples, forward, batch_size, threads, progress)


class Heard(NamedTuple):
    """What one of several networks says of an input: float32 [labels] logits. ``share``: how much it counts."""

    labels: Sequence[str]
    logits: Tensor
    share: float


def likeliest(heard: Mapping[str, Heard]) -> tuple[str, str]:
    """The label, by its name, that has most of all networks' probability, and the network that gives it most of that.

    Labels of one name are one label, whatever the network. A single network's is that of its largest logit.
    """
    if len(heard) == 1:
        ((name, only),) = heard.items()
        return only.labels[int(only.logits.argmax())], name
    said: dict[str, dict[str, float]] = {}
    for name, (labels, logits, share) in heard.items():
        for label, probability in zip(labels, logits.double().softmax(0).tolist(), strict=True):
            by = said.setdefault(label, {})
            by[name] = by.get(name, 0.0) + share * probability
    label = max(said, key=lambda label: sum(said[label].values()))
    return label, max(said[label], key=lambda name: said[label][name])
