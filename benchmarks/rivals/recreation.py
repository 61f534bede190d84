"""A re-creation of ReTeX's offset predictor; the authors' own is not public."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rivals.form import Case, Files, Known
from rivals.low_rank import as_matrix, truncated
from rivals.pack import Pack, Unpack

RIDGE = 1e-10


@dataclass
class Layer:
    """One matrix of all tasks: ``delta_t ~ U diag(e_t C) V^T``, ``U [m, k]``, ``V [n, k]``, ``C [d, k]``."""

    offsets: Tensor
    left: Tensor
    right: Tensor
    mixing: Tensor

    def fit(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """One round of alternating least squares with ``embedding [T, d]``; no step of it makes the fit worse.

        Returns the normal equations of the tasks' coefficients: ``H [k, k]`` and ``b [T, k]``, float64.
        """
        weights = (embedding @ self.mixing).float()
        self.left = _solved((self.offsets @ self.right * weights[:, None]).sum(0), weights, self.right)
        back = self.offsets.transpose(1, 2) @ self.left
        self.right = _solved((back * weights[:, None]).sum(0), weights, self.left)
        gram = _gram(self.left) * _gram(self.right)
        image = (back * self.right).sum(1).double()
        self.mixing = torch.linalg.pinv(embedding) @ _divided(image, gram)
        return gram, image


def encode(case: Case, components: int, width: int, rounds: int = 12) -> Files:
    """ReTeX, arXiv 2606.26902, as far as it is published: low-rank offsets, linear in a task embedding ``[width]``.

    ``delta_hat(e) = U diag(C e) V^T`` per matrix, ``components`` directions shared by all tasks, fitted to the
    experts' parameters by alternating least squares from the tasks' singular vectors; ``width`` is the number of tasks
    or less, the embedding is then learned too. Tensors of fewer than two dimensions are linear in it as well, and so
    are matrices for which factors would be no smaller. Float16; the maps are shared, a task's file is its embedding.
    """
    tasks = list(case.experts)
    merged = case.known.merged
    offsets = {name: torch.stack([case.experts[t][name] - tensor for t in tasks]) for name, tensor in merged.items()}
    embedding = _first_embedding(offsets.values(), width)
    layers = {
        name: _start(stack.flatten(2), components, embedding)
        for name, stack in offsets.items()
        if _factored(merged[name], components, width)
    }
    embedding = _alternate(list(layers.values()), embedding, rounds)
    pack = Pack()
    pack.shorts([components, width])
    for name, stack in offsets.items():
        if name in layers:
            for part in _balanced(layers[name]):
                pack.halves(part)
        else:
            pack.halves((torch.linalg.pinv(embedding) @ stack.reshape(len(tasks), -1).double()).float())
    own = {task: Pack() for task in tasks}
    for task, row in zip(tasks, embedding, strict=True):
        own[task].halves(row)
    return Files({task: part.data() for task, part in own.items()}, pack.data())


def decode(known: Known, files: Files, task: str) -> dict[str, Tensor]:
    """The expert that a task's embedding stands for."""
    unpack = Unpack(files.shared)
    components, width = unpack.shorts(2)
    embedding = Unpack(files.tasks[task]).halves(width)
    found = {}
    for name, tensor in known.merged.items():
        if _factored(tensor, components, width):
            m, n = as_matrix(tensor).shape
            left, right = unpack.halves(m, components), unpack.halves(n, components)
            delta = (left * (embedding @ unpack.halves(width, components))) @ right.T
        else:
            delta = embedding @ unpack.halves(width, tensor.numel())
        found[name] = tensor + delta.reshape(tensor.shape)
    return found


def _factored(tensor: Tensor, components: int, width: int) -> bool:
    if tensor.ndim < 2:
        return False
    m, n = as_matrix(tensor).shape
    return components * (m + n + width) < m * n * width


def _first_embedding(stacks: Iterable[Tensor], width: int) -> Tensor:
    """One-hot where there is room for all tasks, else the leading directions of the tasks' Gram matrix: [T, d]."""
    gram = torch.stack([_gram(stack.reshape(len(stack), -1).T) for stack in stacks]).sum(0)
    if width == len(gram):
        return torch.eye(width, dtype=torch.float64)
    return torch.linalg.eigh(gram)[1].flip(1)[:, :width].contiguous()


def _start(stack: Tensor, components: int, embedding: Tensor) -> Layer:
    """The largest singular vectors of any task ``[T, m, n]``, each used by its own task."""
    count = min(components, *stack.shape[1:])
    parts = [truncated(matrix, count) for matrix in stack]
    values = torch.cat([part[1] for part in parts])
    best = values.topk(components).indices
    left = torch.cat([part[0] for part in parts], 1)[:, best]
    right = torch.cat([part[2] for part in parts])[best].T
    weights = torch.zeros(len(stack), components, dtype=torch.float64)
    weights[best // count, torch.arange(components)] = values[best].double()
    return Layer(stack, left, right.contiguous(), torch.linalg.pinv(embedding) @ weights)


def _alternate(layers: Sequence[Layer], embedding: Tensor, rounds: int) -> Tensor:
    """Fit the layers in turns with the embedding ``[T, d]``, which all of them share; the last is returned."""
    tasks, width = embedding.shape
    for _ in range(rounds):
        left, right = torch.zeros(width, width, dtype=torch.float64), torch.zeros(tasks, width, dtype=torch.float64)
        for layer in layers:
            gram, image = layer.fit(embedding)
            left += layer.mixing @ gram @ layer.mixing.T
            right += image @ layer.mixing.T
        if width < tasks and layers:  # a square one can be anything: the mixings make up for it
            embedding, turn = torch.linalg.qr(_divided(right, left))
            for layer in layers:
                layer.mixing = turn @ layer.mixing
    return embedding


def _balanced(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """The same offsets with unit columns in both factors, so that nothing is too small for float16."""
    lengths = [torch.linalg.vector_norm(part, dim=0).clamp(min=1e-30) for part in (layer.left, layer.right)]
    mixing = layer.mixing * (lengths[0] * lengths[1])
    return layer.left / lengths[0], layer.right / lengths[1], mixing.float()


def _gram(matrix: Tensor) -> Tensor:
    return (matrix.T @ matrix).double()


def _solved(image: Tensor, weights: Tensor, other: Tensor) -> Tensor:
    """A factor ``[m, k]`` from ``sum_t delta_t V diag(a_t)`` by its normal equations."""
    return _divided(image.double(), _gram(weights) * _gram(other)).float()


def _divided(right: Tensor, gram: Tensor) -> Tensor:
    """``B H^-1`` for symmetric ``H``, with a ridge that only matters where it is singular."""
    ridge = RIDGE * max(float(gram.diagonal().mean()), 1e-30)
    return torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), right.T).T
