"""Training without labels: a network whose weights are being coded learns to answer as the network it stands for.

What layers give, and answers, are matched on a task's inputs, made into more by mixing: images are blended, words of
texts replaced by those of other texts. Every batch is halved in one way whatever the number of threads, so the result
is the same on any.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from retex_cli.io.inputs import Example
from retex_cli.models.encoder import feature_layers
from retex_cli.models.network import Network
from retex_cli.models.processor import Inputs
from retex_cli.models.student import Factors, Student
from retex_cli.parallel import ordered_map
from retex_cli.progress import Progress

HALVES = 2
SETTLE = 16
"""Steps between two measurements of where coded values decode to."""
WARMUP = 10
BEGINNING = 0.5
"""How often a text longer than the network reads is read from its beginning, as it is in use."""
REPLACED = 0.3
"""Share of a text's words that give way to others: what is learnt of few inputs by heart is of no use elsewhere."""
SHORT = 128
"""Tokens up to which plain products are faster on a CPU than fused attention (five times, with gradients, at 48)."""
JITTER = 0.3
"""How far an input may stray from its place in the order of lengths, as a share of all inputs."""


class Learner(Protocol):
    """What is trained: values by tensor name of the network, computed from parameters of about unit variance."""

    @property
    def parameters(self) -> list[Tensor]:
        """What the optimiser moves."""

    def values(self) -> dict[str, Tensor | Factors]:
        """Whole tensors, or the factors of an offset where the student adds them; gradients reach ``parameters``."""

    def settle(self) -> None:
        """Once every ``SETTLE`` steps: take stock of what the parameters have become."""


@dataclass(frozen=True)
class Schedule:
    """``steps`` of ``batch_size`` inputs; Adam (arXiv 1412.6980) with a rate that falls to nothing.

    ``rate`` is for offsets of which nothing is kept yet; it falls with the power ``falls`` of what is left out.
    ``features``: how much their loss counts beside that of answers, as they say more of each input.
    """

    steps: int
    batch_size: int
    features: float = 10.0
    rate: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    falls: float = 1.0

    def finer(self, left_out: float) -> Schedule:
        """For offsets that leave out this share of the energy: the finer a file, the smaller the steps that help it."""
        return replace(self, rate=self.rate * left_out**self.falls)


@dataclass(frozen=True)
class Loss:
    """Mean over layers of the squared error relative to the teacher's variance; and the answers' divergence."""

    features: float
    answers: float


def distil(
    teacher: Network,
    network: Network,
    student: Student,
    learner: Learner,
    examples: Sequence[Example],
    schedule: Schedule,
    *,
    seed: int,
    threads: int,
    progress: Progress,
) -> Loss:
    """Train ``learner`` until ``student`` (of ``network``) does as ``teacher`` on ``examples``; the last steps' loss.

    Both networks are filled. Advances progress by one a step.
    """
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(learner.parameters, lr=schedule.rate, betas=schedule.betas)
    falling = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _share_of_rate(step, schedule.steps))
    watched = _Watched(teacher), _Watched(network)
    last: list[Loss] = []
    words = [word for example in examples for word in (example.text or "").split()]
    batches = _batches(examples, schedule, generator)
    for step, batch in enumerate(batches):
        texts = [_reworded(_window(one, network.max_length, generator), words, generator) for one in batch]
        inputs = mixed(network.inputs(texts), generator)
        values = learner.values()
        leaves = {name: _leaf(value) for name, value in values.items()}
        student.take(leaves)
        with _attention(inputs, network.device):
            loss = _backward(watched, inputs, list(_flat(leaves)), schedule.features, threads)
        torch.autograd.backward(list(_flat(values)), [leaf.grad for leaf in _flat(leaves)])
        optimiser.step()
        optimiser.zero_grad()
        falling.step()
        if step % SETTLE == SETTLE - 1:
            learner.settle()
        last = [*last[-SETTLE:], loss]
        progress.advance()
    learner.settle()
    return Loss(sum(x.features for x in last) / len(last), sum(x.answers for x in last) / len(last))


def _share_of_rate(step: int, steps: int) -> float:
    return min((step + 1) / WARMUP, max(1 - step / steps, 0.0))


def _leaf(value: Tensor | Factors) -> Tensor | Factors:
    if isinstance(value, Tensor):
        return value.detach().requires_grad_()
    return value[0].detach().requires_grad_(), value[1].detach().requires_grad_()


def _flat(values: Mapping[str, Tensor | Factors]) -> Iterator[Tensor]:
    for value in values.values():
        if isinstance(value, Tensor):
            yield value
        else:
            yield from value


def _batches(examples: Sequence[Example], schedule: Schedule, generator: torch.Generator) -> Iterator[list[Example]]:
    """``steps`` batches, every example once an epoch, texts of like length together."""
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i].text or ""), i))
    size, done = min(schedule.batch_size, len(examples)), 0
    jitter = JITTER if examples[0].text is not None else len(examples)
    while done < schedule.steps:
        place = torch.arange(len(order)) + jitter * len(order) * torch.rand(len(order), generator=generator)
        epoch = [order[i] for i in place.argsort().tolist()]
        starts = range(0, len(epoch) - size + 1, size)
        for k in torch.randperm(len(starts), generator=generator).tolist()[: schedule.steps - done]:
            yield [examples[i] for i in epoch[starts[k] : starts[k] + size]]
            done += 1


def _window(example: Example, tokens: int | None, generator: torch.Generator) -> Example:
    """A text that is longer than the network reads, every other time from somewhere else than its beginning."""
    words = (example.text or "").split()
    spare = 0 if tokens is None else len(words) - tokens
    if spare <= 0 or float(torch.rand((), generator=generator)) < BEGINNING:
        return example
    start = int(torch.randint(1, spare + 1, (), generator=generator))
    return replace(example, text=" ".join(words[start : start + (tokens or 0)]))


def _reworded(example: Example, words: Sequence[str], generator: torch.Generator) -> Example:
    """A text some of whose words are replaced by ones drawn from ``words``."""
    own = (example.text or "").split()
    if not own:
        return example
    drawn = torch.randint(len(words), (len(own),), generator=generator).tolist()
    gone = (torch.rand(len(own), generator=generator) < REPLACED).tolist()
    text = " ".join(words[k] if replaced else word for word, k, replaced in zip(own, drawn, gone, strict=True))
    return replace(example, text=text)


def _attention(inputs: Inputs, device: torch.device) -> AbstractContextManager[None]:
    """The faster of torch's ways to compute attention over a batch of tokens [n, length]."""
    tokens = inputs.get("input_ids")
    if device.type == "cpu" and tokens is not None and tokens.shape[-1] <= SHORT:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def mixed(inputs: Inputs, generator: torch.Generator) -> Inputs:
    """Images (and other dense inputs), every other one blended with up to half of another: the inputs are few. Bytes
    stay bytes: a network may bring them to its scale, or take nothing else."""
    dense = {name: x for name, x in inputs.items() if x.ndim >= 3 and (x.is_floating_point() or x.dtype == torch.uint8)}
    if len(dense) != len(inputs):
        return inputs
    count = len(next(iter(dense.values())))
    other = torch.randperm(count, generator=generator)
    share = 1 - 0.5 * torch.rand(count, generator=generator) * (torch.arange(count) % 2)
    mixed = {}
    for name, x in dense.items():
        of_each = share.view(-1, *(1,) * (x.ndim - 1)).to(x.device)
        blended = of_each * x.float() + (1 - of_each) * x.float()[other.to(x.device)]
        mixed[name] = blended if x.is_floating_point() else blended.round().to(x.dtype)
    return mixed


def _backward(
    watched: tuple[_Watched, _Watched], inputs: Inputs, leaves: list[Tensor], weight: float, threads: int
) -> Loss:
    """Fill ``grad`` of the leaves, adding up the halves in their order; features count ``weight``."""
    teacher, student = watched
    count = len(next(iter(inputs.values())))
    cut = -(-count // HALVES)
    parts = [{name: x[start : start + cut] for name, x in inputs.items()} for start in range(0, count, cut)]

    def one(part: Inputs) -> tuple[list[Tensor | None], Loss]:
        device = student.device
        with torch.autocast(device.type, torch.bfloat16, enabled=student.fast_bf16):
            with torch.no_grad():
                wanted, wanted_answer = teacher.run(part)
            with torch.enable_grad():
                found, answer = student.run(part)
        features = _feature_loss(found, wanted, part.get("attention_mask"))
        answers = answer_loss(answer, wanted_answer)
        share = len(next(iter(part.values()))) / count
        gradients = torch.autograd.grad(share * (weight * features + answers), leaves, allow_unused=True)
        return list(gradients), Loss(share * float(features.detach()), share * float(answers.detach()))

    total = Loss(0.0, 0.0)
    for gradients, loss in ordered_map(one, parts, threads):
        total = Loss(total.features + loss.features, total.answers + loss.answers)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            found = torch.zeros_like(leaf) if gradient is None else gradient
            leaf.grad = found if leaf.grad is None else leaf.grad + found
    return total


def _feature_loss(found: Sequence[Tensor], wanted: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Layers whose output is the same for all inputs say nothing."""
    total = torch.zeros(())
    for ours, theirs in zip(found, wanted, strict=True):
        a, b = ours.float(), theirs.float()
        if mask is not None and mask.shape == b.shape[: mask.ndim]:
            a, b = a[mask.bool()], b[mask.bool()]
        spread = (b - b.mean(0)).square().sum()
        error = (a - b).square().sum() / spread.clamp_min(1e-12)
        total = total.to(a.device) + error * (spread > 0)
    return total / max(len(found), 1)


def answer_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """The mean divergence of class probabilities [n, classes]; of other outputs the squared error by their variance."""
    ours, theirs = found.float(), wanted.float()
    if theirs.ndim == 2 and theirs.shape[1] > 1:
        return (theirs.softmax(-1) * (theirs.log_softmax(-1) - ours.log_softmax(-1))).sum(-1).mean()
    return (ours - theirs).square().sum() / (theirs - theirs.mean(0)).square().sum().clamp_min(1e-12)


class _Watched:
    """A network that gives its layers' outputs beside its answer. Threads may run it at once: each keeps its own."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self.device = network.device
        # gradients of convolutions take twice the time in bfloat16 on a CPU
        convolves = any(isinstance(layer, _ConvNd) for layer in network.module.modules())
        self.fast_bf16 = network.fast_bf16 and not (convolves and network.device.type == "cpu")
        self._run = threading.local()
        # before BatchNorm the scale of a channel means nothing: there whole blocks are matched
        blocks = any(isinstance(layer, _BatchNorm) for layer in network.module.modules())
        self._gives_states = blocks and network.gives_hidden_states
        layers = _blocks(network.module) if blocks else _weighted(network.module)
        for layer in [] if self._gives_states else layers:
            layer.register_forward_hook(self._keep)

    def run(self, inputs: Inputs) -> tuple[list[Tensor], Tensor]:
        """What layers give, each [n, …], in the order they run; and the answer."""
        if self._gives_states:
            output = self._network.module(**inputs, output_hidden_states=True)
            return list(output.hidden_states[1:]), answer_of(output)
        features: list[Tensor] = []
        self._run.features = features
        answer = answer_of(self._network.module(**inputs))
        self._run.features = None
        count = len(next(iter(inputs.values())))
        return [one for one in features if one is not answer and one.ndim and len(one) == count], answer

    def _keep(self, layer: nn.Module, arguments: object, output: object) -> None:
        features: list[Tensor] | None = getattr(self._run, "features", None)
        if features is not None and isinstance(output, Tensor) and output.is_floating_point():
            features.append(output)


def _blocks(module: nn.Module) -> list[nn.Module]:
    return [module.get_submodule(name) for name in feature_layers(module)]


def _weighted(module: nn.Module) -> list[nn.Module]:
    """Layers with weights of their own."""
    return [layer for layer in module.modules() if next(layer.parameters(recurse=False), None) is not None]


def answer_of(output: object) -> Tensor:
    """The logits of an output that has them, else the first tensor in it."""
    found = getattr(output, "logits", output)
    if isinstance(found, tuple | dict):  # transformers' outputs are dicts
        found = next(iter(found.values() if isinstance(found, dict) else found), None)
    if isinstance(found, Tensor):
        return found
    raise TypeError(f"{type(output).__name__} holds no tensor to compare")
