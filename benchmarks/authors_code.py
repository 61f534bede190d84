"""What the authors of merge methods released, called on tensors: one function per method, code read from their files.

Nothing of theirs is kept here. ``take`` runs single functions and classes of a file, without the imports around them
(data sets, experiment trackers, models), so that torch is all they need. Every function here gets what a fine-tuned
model is to the authors and gives their merged task vector.
"""

from __future__ import annotations

import ast
import copy
import logging
import math
import re
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import tqdm
from authors_model import Given, Model
from torch import Tensor, nn


def take(file: Path, *names: str, **given: object) -> SimpleNamespace:
    """The functions and classes called ``names`` of a file, in a namespace of usual modules and what is ``given``."""
    tree = ast.parse(file.read_text())
    tree.body = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name in names]
    usual = (torch, nn, math, copy, re, logging, np, tqdm, OrderedDict, defaultdict, partial)
    space: dict[str, object] = {getattr(thing, "__name__").rpartition(".")[2]: thing for thing in usual}  # noqa: B009
    space |= {"np": np, "deepcopy": copy.deepcopy, "log": logging.getLogger(__name__), **given}
    exec(compile(tree, str(file), "exec"), space)  # with our __future__: names in annotations are not looked up
    return SimpleNamespace(**{name: space[name] for name in names})


Empty = type("Empty", (), {})


class Holder(nn.Module):
    """Tensors as a model, as far as the authors' code looks."""

    def __init__(self, tensors: Model) -> None:
        super().__init__()
        self.tensors = {name: tensor.clone() for name, tensor in tensors.items()}

    def state_dict(self, **_: object) -> Model:  # type: ignore[override]
        return self.tensors

    get_ft_parameters = state_dict

    def load_state_dict(self, tensors: Model, **_: object) -> SimpleNamespace:  # type: ignore[override]
        self.tensors = dict(tensors)
        return SimpleNamespace(unexpected_keys=[], missing_keys=[])


class Pool:
    """Base and experts as FusionBench hands them to a method, and what its methods inherit."""

    _config_mapping: Mapping[str, str] = {}
    fabric = SimpleNamespace(device=torch.device("cpu"), backward=lambda loss: loss.backward())
    ignore_keys, model_save_path = (), None

    def __init__(self, given: Given) -> None:
        self.given, self.model_names = given, given.tasks

    def load_model(self, name: str) -> Holder:
        return Holder(self.given.experts.get(name, self.given.base))

    def load_pretrained_model(self) -> Holder:
        return Holder(self.given.base)

    def profile(self, _: str) -> nullcontext[None]:
        return nullcontext()

    def print_profile_summary(self) -> None:
        pass


def _less(merged: Model, base: Model) -> Model:
    return {n: merged[n].detach() - base[n] for n in base}


def _vectors(models: list[Model]) -> list[SimpleNamespace]:
    return [SimpleNamespace(vector=dict(model)) for model in models]


def _config(given: Given, **more: object) -> SimpleNamespace:
    return SimpleNamespace(DATASETS=given.tasks, device="cpu", **more)


def one_less(share: float, elements: int) -> float:
    """The percentage at which ``topk_values_mask``, which is in many of these files, keeps ``int(share * elements)``.

    It takes the k-th smallest magnitude for the threshold, k being how many are to go: one entry more stays.
    """
    return 100 * (int(share * elements) - 0.5) / elements


def ties_released(root: Path, given: Given, percent: float = 20) -> Model:
    """TIES over the whole task vector, top 20 %."""
    names = ("topk_values_mask", "resolve_zero_signs", "resolve_sign", "disjoint_merge", "merge_methods")
    code = take(root / "src/utils/merge_utils.py", *names, logger=logging.getLogger(__name__))
    return given.split(code.merge_methods("topk", given.ravelled(), percent, "mass", "dis-mean"))


def ties(root: Path, given: Given) -> Model:
    """The same without the entry too many."""
    return ties_released(root, given, one_less(0.2, given.ravelled().shape[1]))


def breadcrumbs(root: Path, given: Given, taus: list[Model] | None = None) -> Model:
    """Keep 15 %, remove the largest 0.6 %; each tensor as one row."""
    file, names = root / "src/task_vectors.py", ("TaskVectorABC", "TaskVectorMiddleKeep")
    kept = take(file, *names, ABC=object).TaskVectorMiddleKeep
    merged: Model = sum(kept(vector=tau, top_k_keep=0.15, top_k_remove=0.006) for tau in taus or given.as_rows()).vector
    return merged


def breadcrumbs_rows(root: Path, given: Given) -> Model:
    """As released: the shares of each row."""
    return breadcrumbs(root, given, given.taus)


def model_stock(root: Path, given: Given) -> Model:
    """FusionBench's."""
    file, names = root / "fusion_bench/method/model_stock/model_stock.py", ("compute_angle", "compute_ratio")
    library = SimpleNamespace(auto_register_config=lambda kind: kind, LazyStateDict=())
    base = {"fusion_bench": library, "SimpleProfilerMixin": Empty, "BaseAlgorithm": Pool, "EPS": 1e-8}
    method = take(file, *names, "merge_weights", "ModelStock", **base).ModelStock
    method.__init__ = Pool.__init__
    return _less(method(given).run(Pool(given)).tensors, given.base)


def pcb(root: Path, given: Given) -> Model:
    """The function of ``pcb-merging.py``, its 10 %."""
    code = take(root / "pcb-merging.py", "normalize", "clamp", "act", "PCB_merge")
    return given.split(code.PCB_merge(given.ravelled(), pcb_ratio=0.1)[0])


def consensus(root: Path, given: Given) -> Model:
    """TALL masks with one lambda for all tasks, the mask of two tasks or more, on the summed task vectors."""
    file, taus, names = root / "src/utils/tallmask_utils.py", given.ravelled(), list(given.base)
    flat = torch.cat([t.flatten() for t in given.base.values()])
    experts = torch.stack([torch.cat([t.flatten() for t in e.values()]) for e in given.experts.values()])
    masks = take(file, "generate_task_masks", log_wandb_mask_sparsity=lambda mask: None).generate_task_masks(
        taus, experts, flat, tall_mask_lambda=0.4
    )
    tall = {task: given.split(mask) for task, mask in zip(given.tasks, masks, strict=True)}
    agreed = take(
        file, "construct_consensus_mask", load_tall_mask=lambda *_: tall,
        state_dict_to_vector=lambda state, remove_keys: torch.cat([state[name] for name in names]),
    ).construct_consensus_mask(given.base, 2, None)  # fmt: skip
    return given.split(taus.sum(0) * agreed)


def emr(root: Path, given: Given) -> Model:
    """The unified task vector."""
    return dict(take(root / "merge_vit/src/main_emr_merging.py", "emr_merge").emr_merge(_vectors(given.taus))[0])


def tsv_m(root: Path, given: Given) -> Model:
    """TSV-M; convolutions are averaged unless they come as matrices."""
    name = "compute_and_sum_svd_mem_reduction"
    return dict(getattr(take(root / "src/utils/TSVM_utils.py", name), name)(_vectors(given.taus), _config(given)))


def iso(root: Path, given: Given, name: str) -> Model:
    """Iso-C or Iso-CTS, by name; convolutions are averaged unless they come as matrices."""
    config = _config(given, method=SimpleNamespace(common_space_fraction=0.8))
    return dict(getattr(take(root / "src/utils/iso.py", name), name)(_vectors(given.taus), config))


def knots_released(root: Path, given: Given, percent: float = 20) -> Model:
    """TIES on the aligned task vectors, top 20 % of all tensors together, times 0.6."""
    names = ("topk_values_mask", "resolve_zero_signs", "resolve_sign", "ties_masking", "chunked_disjoint_mean")
    masking = take(root / "masking_ops.py", *names, "masked_merge")
    more = {"get_mask_fn": lambda _: masking.ties_masking, "masked_merge": masking.masked_merge, "get_merging_fn": None}
    merger = take(root / "task_merger.py", "VectorOps", "TaskMerger", "SVDMerger", **more, tqdm=tqdm.tqdm).SVDMerger
    experts = [Holder(expert) for expert in given.experts.values()]
    found = merger(experts, Holder(given.base), lambda model: model, device="cpu")
    found.set_scaling_coeffs(0.6)
    config = {"merge_method": "ties", "topK": percent, "merging_type": "mean"}
    found.transform(config)
    return _less(found.merge(config).tensors, given.base)


def knots(root: Path, given: Given) -> Model:
    """The same, one tensor at a time, without the entry too many."""
    merged: Model = {}
    for name, base in given.base.items():
        values = torch.linalg.svdvals(torch.cat([tau[name] for tau in given.taus], 1))
        percent = one_less(0.2, int((values > 1e-5).sum()) * base.shape[1])
        merged |= knots_released(root, given.some([name], given.tasks), percent)
    return merged


def lines(root: Path, given: Given) -> Model:
    """LiNeS with ``beta = 0.5`` on TIES; ``alpha`` by the norms that ``aggregation.py`` takes."""
    names, top = ("resolve_zero_signs", "resolve_sign", "disjoint_merge", "ties_merging"), "topk_values_mask"
    top_mask = {top: getattr(take(root / "src/utils/utils.py", top), top)}
    taus, code = given.ravelled(), take(root / "src/utils/ties_utils.py", *names, **top_mask)
    merged = code.ties_merging(taus, reset_thresh=one_less(0.2, taus.shape[1]), merge_func="dis-mean")
    alpha = (taus.sum(0).abs().sum() / merged.abs().sum() / len(taus)).item()
    scale = take(root / "src/eval/eval.py", "LiNeS_scaling").LiNeS_scaling
    return dict(scale(SimpleNamespace(vector=given.split(merged)), alpha, 0.5, num_blocks=3).vector)


def doge(root: Path, given: Given) -> Model:
    """DOGE with the constants of its configuration, without the entry too many."""
    return doge_released(root, given, one_less(0.3, sum(t.numel() for t in given.base.values() if t.dim() > 1)))


def doge_released(root: Path, given: Given, percent: float = 30) -> Model:
    """The same with it."""
    file, clock = root / "fusion_bench/method/doge_ta/doge_ta.py", SimpleNamespace(time=lambda: 0)
    method = take(
        file, "DOGE_TA_Algorithm", BaseAlgorithm=Pool, SimpleProfilerMixin=Empty,
        LightningFabricMixin=type("Other", (), {}), BaseModelPool=Pool, time=clock,
    ).DOGE_TA_Algorithm  # fmt: skip
    method.__init__ = Pool.__init__
    found = method(given)
    found.delta, found.config = None, SimpleNamespace(subspace=6, K=percent, lamda=0.07)
    return _less(found.run(Pool(given)).tensors, given.base)


def fisher(root: Path, given: Given, favour_first: bool = False) -> Model:
    """Normalised; the floor under every model's Fisher information, as released under the first model's alone.

    Its four functions of TensorFlow by torch's.
    """
    tf = SimpleNamespace(
        maximum=lambda x, floor: x.clamp(min=floor), square=torch.square, sqrt=torch.sqrt,
        reduce_sum=lambda x, axis=None: (torch.stack(x) if isinstance(x, list) else x).sum(axis),
    )  # fmt: skip
    code = take(root / "model_merging/merging.py", "_merge_with_coeffs", "_l2_norm_of_fisher", tf=tf)
    merged: Model = {}
    slots = [SimpleNamespace(assign=partial(merged.__setitem__, name)) for name in given.base]
    fishers = [[given.fishers[task][n] for n in given.base] for task in given.tasks]
    code._merge_with_coeffs(
        slots, [list(expert.values()) for expert in given.experts.values()], [1 / len(fishers)] * len(fishers), fishers,
        favor_target_model=favour_first, normalization_constants=[code._l2_norm_of_fisher(each) for each in fishers],
    )  # fmt: skip
    return _less(merged, given.base)


def regmean(root: Path, given: Given, mean: bool = False) -> Model:
    """RegMean on the Gram matrices of the inputs; as released on their ``mean`` over rows (``local_trainer.py``)."""
    file = root / "src/model_merge/avg_merger.py"
    merger = take(file, "ModelMergerBase", "FedAvgMerger").FedAvgMerger
    config = SimpleNamespace(regmean_exclude_param_regex=[], regmean_diag=False, regmean_reduce_nondiag=0.9)
    grams = [
        {n.removesuffix(".weight"): x.T @ x / (len(x) if mean else 1) for n, x in given.inputs[task].items()}
        for task in given.tasks
    ]
    weights = {n: [expert[n] for expert in given.experts.values()] for n in given.base}
    return _less(merger(None, config, None, None).regmean_mean_params(weights, grams), given.base)


def esm_vision(root: Path, given: Given) -> Model:
    """ESM's vision code: essential subspaces where there are inputs."""
    esd = take(root / "ESM-ViT/essential_subspace_decomposition.py", "_compute_esd")._compute_esd
    merge = take(root / "ESM-ViT/src/utils/esm_utils.py", "esm_merge").esm_merge
    tasks = dict(zip(given.tasks, _vectors(given.taus), strict=True))
    with mock.patch.object(Tensor, "cuda", lambda self: self):
        return dict(merge(tasks, _config(given), None, _directions(given, esd)))


def esm_roberta(root: Path, given: Given) -> Model:
    """ESM's RoBERTa code."""
    folder, utils = root / "ESM-RoBERTa", SimpleNamespace(args_inspector=lambda function: function)
    file, name = folder / "essential_subspace_decomposition.py", "get_principal_direction_svd"
    esd = getattr(take(file, name), name)
    param = take(folder / "param.py", "param", MODE="drop").param
    method = take(folder / "merge.py", "MergingMethod", utils=utils, param=param).MergingMethod
    experts = {task: param(expert) for task, expert in given.experts.items()}
    with mock.patch.object(Tensor, "cuda", lambda self: self):
        merged = method([], []).esm(param(given.base), experts, 1.0, _directions(given, esd))
        return _less(dict(merged.items()), given.base)


def _directions(given: Given, esd: object) -> dict[str, dict[str, Model]]:
    found: dict[str, dict[str, Model]] = {}
    for task, tau in zip(given.tasks, given.taus, strict=True):
        parts = {n: esd(x @ tau[n].T) for n, x in given.inputs[task].items()}  # type: ignore[operator]
        found[task] = {n: {"eigenvalues": s, "eigenvectors": v} for n, (s, v) in parts.items()}
    return found
