"""The small model that the authors' code and retex merge: base, experts, inputs of layers, Fisher information."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Model = dict[str, Tensor]

BLOCK = {
    "attn.in_proj_weight": (96, 64),
    "attn.out_proj.weight": (64, 64),
    "mlp.c_fc.weight": (96, 64),
    "mlp.c_proj.weight": (64, 96),
    "mlp.c_fc.bias": (96,),
    "layer_norm.weight": (64,),
}
SHAPES = {
    "conv1.weight": (16, 3, 4, 4),
    "token_embedding.weight": (50, 64),
    **{f"encoder.layers.{i}.{name}": shape for i in range(3) for name, shape in BLOCK.items()},
    "ln_post.weight": (64,),
}
MATRICES = [name for name, shape in SHAPES.items() if len(shape) == 2 and "layers" in name]
IN_ROBERTA = {
    "attn.in_proj_weight": "attention.self.query.weight",
    "attn.out_proj.weight": "attention.output.dense.weight",
    "mlp.c_fc.weight": "intermediate.dense.weight",
    "mlp.c_proj.weight": "output.dense.weight",
}
TASKS = ["ants", "bees", "cats", "dogs"]
INPUTS = {"ants": 200, "bees": 120, "cats": 400, "dogs": 200}


@dataclass(frozen=True)
class Given:
    """The same tensors that retex gets: weights, rows of inputs of the layers, Fisher information, by task."""

    base: Model
    experts: Mapping[str, Model]
    inputs: Mapping[str, Model]
    fishers: Mapping[str, Model]

    def to(self, dtype: torch.dtype) -> Given:
        """All of it in another precision."""

        def wide(models: Mapping[str, Model]) -> dict[str, Model]:
            return {task: {n: t.to(dtype) for n, t in model.items()} for task, model in models.items()}

        return Given(wide({"": self.base})[""], wide(self.experts), wide(self.inputs), wide(self.fishers))

    def some(self, names: list[str], tasks: list[str]) -> Given:
        """Some of the tensors, of some of the tasks."""

        def less(models: Mapping[str, Model]) -> dict[str, Model]:
            return {task: {n: models[task][n] for n in names if n in models[task]} for task in tasks}

        return Given({n: self.base[n] for n in names}, less(self.experts), less(self.inputs), less(self.fishers))

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return list(self.experts)

    @property
    def taus(self) -> list[Model]:
        """Task vectors."""
        return [{n: w - self.base[n] for n, w in expert.items()} for expert in self.experts.values()]

    def as_matrices(self) -> Given:
        """Convolutions as ``d_out x rest``."""

        def flat(model: Model) -> Model:
            return {n: t.flatten(1) if t.dim() > 2 else t for n, t in model.items()}

        return replace(self, base=flat(self.base), experts={t: flat(e) for t, e in self.experts.items()})

    def as_rows(self) -> list[Model]:
        """Task vectors, every tensor a single row."""
        return [{n: t.flatten() for n, t in tau.items()} for tau in self.taus]

    def ravelled(self) -> Tensor:
        """Task vectors ``[T, all]``, each laid end to end."""
        return torch.stack([torch.cat([t.flatten() for t in tau.values()]) for tau in self.taus])

    def split(self, vector: Tensor) -> Model:
        """What was laid end to end."""
        parts = vector.split([t.numel() for t in self.base.values()])
        return dict(zip(self.base, parts, strict=True))


def make(low_rank: bool = False) -> Given:
    """Weights, task vectors that share a part and have a few large entries, inputs of the blocks' matrices, Fishers."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    def moved(shape: tuple[int, ...]) -> Tensor:
        if low_rank:
            return 0.002 * random(shape[0], 4) @ random(4, *shape[1:])
        return 0.003 * random(*shape) * random(*shape).square()

    def inputs(rows: int, columns: int) -> Tensor:
        return random(rows, columns) * (1 + 3 * random(columns).abs())

    names = MATRICES if low_rank else list(SHAPES)
    base = {n: 0.05 * random(*SHAPES[n]) for n in names}
    common = {n: moved(SHAPES[n]) for n in names}
    experts = {task: {n: base[n] + moved(SHAPES[n]) + 0.5 * common[n] for n in names} for task in TASKS}
    rows = {task: {n: inputs(INPUTS[task], SHAPES[n][1]) for n in MATRICES} for task in TASKS}
    fishers = {task: {n: 1e-3 * random(*SHAPES[n]).pow(4) for n in names} for task in TASKS}
    return Given(base, experts, rows, fishers)


def for_vision(given: Given, rows: int = max(INPUTS.values())) -> Given:
    """No inputs of attention's output, which ESM's vision code leaves to TSV-M; at most so many rows of the others."""
    read = {task: {n: x[:rows] for n, x in each.items() if "out_proj" not in n} for task, each in given.inputs.items()}
    return replace(given, inputs=read)


def for_roberta(given: Given) -> Given:
    """Names as RoBERTa has them, and no biases, which ESM's RoBERTa code leaves out."""

    def renamed(model: Model) -> Model:
        found = {}
        for name, tensor in model.items():
            for vision, roberta in IN_ROBERTA.items():
                name = name.replace(vision, roberta)
            if not name.endswith("bias"):
                found[name] = tensor
        return found

    def every(models: Mapping[str, Model]) -> dict[str, Model]:
        return {task: renamed(model) for task, model in models.items()}

    return Given(renamed(given.base), every(given.experts), every(given.inputs), every(given.fishers))


def two(given: Given) -> Given:
    """Two of the tasks."""
    return given.some(list(given.base), TASKS[:2])
