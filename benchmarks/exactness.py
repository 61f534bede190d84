"""Are retex's merges mergekit's and peft's? Every tensor, on small models of real shapes, in float32 and bfloat16.

Writes mergekit's own YAML files, lets mergekit merge them in an environment of its own, and lets
``retex merge --config`` merge the same files. Differences are given relative to the largest entry of the tensor's task
vectors. peft's ``merge_utils`` get the same task vectors as tensors.

python benchmarks/exactness.py [--peer-venv .peers/] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping
from pathlib import Path

import record
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from retex_cli.cli.app import run as retex
from retex_cli.commands.merge import MergeConfig
from retex_cli.commands.merge_config import from_mergekit
from retex_cli.merging.memory import merge_tensors
from retex_cli.merging.selection import keep_count
from retex_cli.merging.table import find_method, options_for

PEERS = ("mergekit==0.1.5",)  # peft comes with it
TASKS = ("ants", "bees", "cats")
SAME = 1e-4  # relative to the largest entry of the task vectors: more than that is not rounding
Model = dict[str, Tensor]

DRIVER = """
import json, sys, traceback, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False, random_seed=1)
failed = {}
for file, out in json.load(open(sys.argv[1])):
    try:
        run_merge(MergeConfiguration.model_validate(yaml.safe_load(open(file))), out, options)
    except Exception as error:
        failed[file] = f"{type(error).__name__}: {error}"
json.dump(failed, open(sys.argv[2], "w"))
"""

PEFT = """
import sys, torch
from peft.utils import merge_utils as peft
from safetensors.torch import load_file, save_file
given = load_file(sys.argv[1])
taus, dropped, ones = list(given["taus"]), given["dropped"], torch.ones(len(given["taus"]))
save_file({
    "ties": peft.ties(taus, ones, 0.3),
    "magnitude_prune": peft.magnitude_prune(taus, ones, 0.3),
    "task_arithmetic": peft.task_arithmetic(taus, ones),
    "dare_ties, same masks": peft.disjoint_merge(dropped, peft.calculate_majority_sign_mask(dropped)),
}, sys.argv[2])
"""

WEIGHTS = ("weight", (0.9, 0.5, [0.2, 0.7, 1.1]))
T = [{"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]}, {"filter": "mlp", "value": [1, 0.3]}, {"value": 0.5}]
DENSE = ("density", (0.3, 0.6, [{"filter": "mlp", "value": 0.5}, {"value": [0.2, 0.9]}]))
#: method -> (parameters per model, parameters of the file); what draws at random is compared where nothing is dropped
METHODS: dict[str, tuple[dict[str, tuple[object, ...]], dict[str, object]]] = {
    "linear": (dict([WEIGHTS]), {}),
    "slerp": ({}, {"t": T}),
    "task_arithmetic": (dict([WEIGHTS]), {"lambda": 0.8}),
    "ties": (dict([WEIGHTS, DENSE]), {"lambda": 1.1}),
    "dare_linear": (dict([WEIGHTS]), {}),
    "dare_ties": (dict([WEIGHTS]), {}),
    "della": (dict([WEIGHTS]), {}),
    "della_linear": (dict([WEIGHTS]), {"normalize": True}),
    "breadcrumbs": (dict([WEIGHTS, DENSE]), {"gamma": 0.02}),
    "breadcrumbs_ties": (dict([WEIGHTS, DENSE]), {}),
    "model_stock": ({}, {}),
    "sce": ({}, {"select_topk": 0.4}),
}
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
TIED = "entries of one magnitude at the threshold: retex keeps them all, mergekit an arbitrary part"
NOTES = {
    **dict.fromkeys(("ties", "breadcrumbs", "breadcrumbs_ties"), TIED),
    **dict.fromkeys(RANDOM, "each draws masks of its own: density 1 here"),
    "sce": "entries of one variance at the threshold: as for ties, and with them the tasks' weights",
    "slerp": "one vector all zero, the other not: retex interpolates linearly, mergekit at a right angle",
}
IN_BFLOAT16 = {
    **dict.fromkeys(
        ("ties", "dare_ties", "della", "breadcrumbs_ties", "sce"),
        "mergekit sums in bfloat16: small sums change their sign",
    ),
    "model_stock": "mergekit takes norms and angles in bfloat16",
}
SHAPES: dict[str, dict[str, object]] = {
    "llama": {
        "vocab_size": 1000, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 5,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "qwen2": {
        "vocab_size": 500, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "gpt2": {"vocab_size": 500, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64},
}  # fmt: skip
KINDS = {"float32": "float32", "bfloat16": None, "bfloat16, summed in float32": "float32"}


def main() -> None:
    """Make, merge twice, compare, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-venv", type=Path, default=record.ROOT / ".peers")
    parser.add_argument("--keep", type=Path, help="leave models and merges here")
    given = parser.parse_args()
    torch.set_num_threads(1)
    python = peer_python(given.peer_venv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        rows = mergekit_rows(folder, python) + spread_rows(folder, python) + peft_rows(folder, python)
    for row in rows:
        print(json.dumps(row))
    record.write("exactness", {"peers": list(PEERS), "shapes": list(SHAPES), "same": SAME, "rows": rows})


def peer_python(folder: Path) -> Path:
    """The interpreter of an environment that has the peers, made if it is not there."""
    python = folder / "bin" / "python"
    if not python.is_file():
        venv.create(folder, with_pip=True)
    if subprocess.run([python, "-c", "import mergekit, peft"], check=False, capture_output=True).returncode:
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS], check=True)
    return python


def make_models(folder: Path, shape: str, dtype: torch.dtype) -> None:
    """A small random model and three experts near it, spread as fine-tuning spreads: a few entries move far."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(shape, **SHAPES[shape], bos_token_id=0, eos_token_id=0)
    base = AutoModelForCausalLM.from_config(config)
    for name, weight in base.named_parameters():
        if name.endswith("bias"):
            weight.data.normal_(0, 0.02)
    base.to(dtype).save_pretrained(folder / "base")
    base.float()
    for task in TASKS:
        expert = copy.deepcopy(base)
        for weight in expert.parameters():
            weight.data += 0.003 * torch.randn_like(weight) * torch.rand_like(weight).square()
        expert.to(dtype).save_pretrained(folder / task)


def document(folder: Path, method: str, dtype: str | None, more: Mapping[str, object] | None = None) -> Path:
    """mergekit's YAML for one method."""
    each, shared = METHODS[method]
    tasks = TASKS[:1] if method == "slerp" else TASKS
    models: list[dict[str, object]] = [{"model": str(folder / "base")}] if method == "slerp" else []
    for i, task in enumerate(tasks):
        parameters = {name: values[i] for name, values in each.items()}
        models.append({"model": str(folder / task), **({"parameters": parameters} if parameters else {})})
    found: dict[str, object] = {"merge_method": method, "models": models, "parameters": {**shared, **(more or {})}}
    if method != "linear":
        found["base_model"] = str(folder / "base")
    if dtype:
        found["dtype"] = dtype
    file = folder / f"{method}{'-random' if more else ''}-{dtype or 'as-is'}.yml"
    file.write_text(yaml.safe_dump(found, sort_keys=False))
    return file


def merge_both(folder: Path, python: Path, files: list[Path]) -> dict[str, str]:
    """Merge every file with both tools into ``NAME.theirs`` and ``NAME.ours``; file -> why mergekit failed."""
    (folder / "jobs.json").write_text(json.dumps([(str(file), str(file.with_suffix(".theirs"))) for file in files]))
    subprocess.run([python, "-c", DRIVER, folder / "jobs.json", folder / "failed.json"], check=True)
    for file in files:
        line = ["merge", "--config", str(file), "-o", str(file.with_suffix(".ours")), "--overwrite", "--quiet"]
        if retex([*line, "--device", "cpu"]):
            sys.exit(f"retex could not merge {file}")
    found: dict[str, str] = json.loads((folder / "failed.json").read_text())
    return found


def load(folder: Path) -> Model:
    """All tensors of a folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def mergekit_rows(scratch: Path, python: Path) -> list[dict[str, object]]:
    """One row per method and type: the worst of all shapes."""
    rows = []
    for kind, dtype in KINDS.items():
        stored = torch.float32 if kind == "float32" else torch.bfloat16
        found = [
            shape_rows(scratch / shape / str(stored).removeprefix("torch."), shape, dtype, python) for shape in SHAPES
        ]
        for method in METHODS:
            notes = [NOTES.get(method, ""), "" if stored == torch.float32 or dtype else IN_BFLOAT16.get(method, "")]
            row: dict[str, object] = {"peer": PEERS[0], "method": method, "dtype": kind}
            row |= {key: max(each[method][key] for each in found) for key in ("worst", "beyond")}
            rows.append(row | {"note": "; ".join(filter(None, notes))})
    return rows


def shape_rows(folder: Path, shape: str, dtype: str | None, python: Path) -> dict[str, dict[str, float]]:
    """Per method how far the two tools are apart on models of one shape, stored as the folder's name says."""
    if not (folder / "base").is_dir():
        folder.mkdir(parents=True)
        make_models(folder, shape, getattr(torch, folder.name))
    files = {method: document(folder, method, dtype) for method in METHODS}
    failed = merge_both(folder, python, list(files.values()))
    if failed:
        sys.exit(f"mergekit could not merge: {failed}")
    return {method: differences(folder, file) for method, file in files.items()}


def differences(folder: Path, file: Path) -> dict[str, float]:
    """The worst entry outside of ties at a threshold, and the share of all entries that differ beyond rounding."""
    ours, theirs, base = (
        load(path) for path in (file.with_suffix(".ours"), file.with_suffix(".theirs"), folder / "base")
    )
    assert set(ours) == set(theirs), set(ours) ^ set(theirs)
    experts = {task: load(folder / task) for task in TASKS}
    config, _ = from_mergekit(str(file), MergeConfig("", {}, ""))
    worst, beyond, entries = 0.0, 0, 0
    for name, tensor in base.items():
        assert ours[name].dtype == theirs[name].dtype
        taus = torch.stack([expert[name].double() - tensor.double() for expert in experts.values()]).flatten(1)
        relative = (ours[name].double() - theirs[name].double()).abs().flatten() / taus.abs().max().clamp(min=1e-30)
        tied = at_threshold(taus, options_for(find_method(config.method), name, config.options, config.overrides))
        worst = max(worst, torch.where(tied, 0.0, relative).max().item())
        beyond += int((relative > rounding(theirs[name], taus)).sum())
        entries += relative.numel()
    return {"worst": worst, "beyond": beyond / entries}


def rounding(merged: Tensor, taus: Tensor) -> Tensor:
    """How much of the largest entry of ``taus [T, n]`` is rounding, ``[n]``: two last places of what is stored."""
    places = 2 * torch.finfo(merged.dtype).eps * merged.double().abs().flatten()
    return (places / taus.abs().max().clamp(min=1e-30)).clamp(min=SAME)


def at_threshold(taus: Tensor, options: Mapping[str, object]) -> Tensor:
    """Which entries of float64 ``taus [T, n]`` equal a threshold that more than one entry equals: bool ``[n]``."""
    tied = torch.zeros(taus.shape[1], dtype=torch.bool)
    scores, density = taus.abs(), options.get("density", 1.0)
    if options.get("of") == "differing":
        scores = taus.var(0, correction=0)[None]
    for task, score in zip(TASKS, scores, strict=False):
        share = density if isinstance(density, float) else density.of(task)  # type: ignore[attr-defined]
        n = int((score > 0).sum()) if "of" in options else len(score)
        gamma = options.get("gamma", 0.0)
        outliers = int((gamma if isinstance(gamma, float) else gamma.of(task)) * n)  # type: ignore[attr-defined]
        for rank in (outliers, outliers + keep_count(n, share)):
            if share < 1 and 0 < rank < len(score):
                bound = score.float().sort(descending=True).values[rank - 1]
                equal = score.float() == bound
                tied |= equal if equal.sum() > 1 else False
    return tied


def spread_rows(scratch: Path, python: Path) -> list[dict[str, object]]:
    """Methods that draw at random, with half of all entries dropped: the energy of what was merged."""
    folder = scratch / "llama" / "float32"
    files = {
        method: document(folder, method, "float32", {"density": 0.5, **({"epsilon": 0.2} if "della" in method else {})})
        for method in RANDOM
    }
    failed = merge_both(folder, python, list(files.values()))
    base = load(folder / "base")
    rows = []
    for method, file in files.items():
        assert str(file) not in failed, failed
        moved = []
        for suffix in (".ours", ".theirs"):
            merged = load(file.with_suffix(suffix))
            moved.append(torch.cat([(merged[name].double() - base[name].double()).flatten() for name in base]))
        ratio = (moved[0].square().sum() / moved[1].square().sum()).item()
        note = (
            "half of the entries dropped by each tool's own masks: the ratio of the energies of what was merged, less 1"
        )
        rows.append(
            {"peer": PEERS[0], "method": f"{method}, random", "dtype": "float32", "worst": abs(ratio - 1), "note": note}
        )
    return rows


def peft_rows(scratch: Path, python: Path) -> list[dict[str, object]]:
    """peft's functions on task vectors, laid end to end."""
    rows = []
    for kind in ("float32", "bfloat16"):
        base = load(scratch / "llama" / kind / "base")
        taus = torch.stack([
            torch.cat([(expert[name].float() - base[name].float()).flatten() for name in base])
            for expert in (load(scratch / "llama" / kind / task) for task in TASKS)
        ])  # fmt: skip
        zero, experts = {"w": torch.zeros(taus.shape[1])}, {t: {"w": tau} for t, tau in zip(TASKS, taus, strict=True)}
        plus = {"scope": "tensor", "cancelled": "plus", "density": 0.3}
        one = [merge_tensors("ties", zero, {t: experts[t]}, plus)["w"] for t in TASKS]
        dropped = [merge_tensors("dare", zero, {t: experts[t]}, {"density": 0.4, "alpha": 1})["w"] for t in TASKS]
        ours = {
            "ties": merge_tensors("ties", zero, experts, plus)["w"],
            "magnitude_prune": sum(one[1:], one[0]),
            "task_arithmetic": merge_tensors("task_arithmetic", zero, experts, {"alpha": 1})["w"],
            "dare_ties, same masks": merge_tensors("dare_ties", zero, experts, {"density": 0.4, "cancelled": "plus"})[
                "w"
            ],
        }
        save_file({"taus": taus, "dropped": torch.stack(dropped)}, scratch / "peft-in.safetensors")
        subprocess.run(
            [python, "-c", PEFT, scratch / "peft-in.safetensors", scratch / "peft-out.safetensors"], check=True
        )
        tied = at_threshold(taus.double(), {"density": 0.3})
        for method, theirs in load_file(scratch / "peft-out.safetensors").items():
            relative = (ours[method] - theirs).abs() / taus.abs().max()
            out = tied if method in ("ties", "magnitude_prune") else torch.zeros_like(tied)
            beyond = int((relative > SAME).sum()) / relative.numel()
            note = TIED.replace("mergekit", "peft") if method in ("ties", "magnitude_prune") else ""
            rows.append({
                "peer": "peft", "method": method, "dtype": kind, "worst": relative[~out].max().item(),
                    "beyond": beyond, "note": note,
            })  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
