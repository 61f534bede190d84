"""Are retex's merges those of the methods' authors? Their released code and retex on the same tensors.

One row per method: the largest difference of an entry, relative to the largest entry of the tensor's merged task
vector, with the authors' code in float32 and in float64 (what is left of the first is the authors' rounding), and how
far the merge by their code as released lies where it follows another rule than retex.

python benchmarks/authors.py [--repositories .peers/authors] [ROW ...]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import authors_code as code
import record
import torch
from authors_model import SHAPES, TASKS, Given, Model, for_roberta, for_vision, make, two

from retex_cli.merging.memory import merge_tensors
from retex_cli.merging.table import find_method

COMMITS = {
    "prateeky2806/ties-merging": "44e7891fc84f3de7e4caa52664cd864ca3715e91",
    "rezazzr/breadcrumbs": "f89fc664a171df2b90567aa1313ec7be677f2669",
    "tanganke/fusion_bench": "54c9e8c9d9621620c720452cd8533332a32d3689",
    "duguodong7/pcb-merging": "5897888b5d24adfcd33e124793d113746e00f3ff",
    "nik-dim/tall_masks": "d10af8b21383322367fb35474bd9cd0f9ebe9ecf",
    "harveyhuang18/EMR_Merging": "cc225ecb5589aae273dc10889676d94366cd34fc",
    "AntoAndGar/task_singular_vectors": "a6c97188f7aa0bb20753de4f2939be89dd64f1c3",
    "danielm1405/iso-merging": "d34010af8ba129ef4d17a91ca9943b413fe06f8c",
    "gstoica27/KnOTS": "baa35e85768b8841820d35edc3e41b25304248c5",
    "wang-kee/LiNeS": "43a7bdd564a16195b164abc2c64ec1856c59c211",
    "mmatena/model_merging": "46802f98319fea0a606b2881eac5cdc01dbb48e7",
    "bloomberg/dataless-model-merging": "92247aece13824c64f774b36732d297e9c5d7bc7",
    "kiddo127/ESM": "fc82fe768becf3437aa210f1651a01c20b2aef61",
}

SAME = 1e-4
"""More than this share of the largest merged entry is not rounding."""


def grams(given: Given) -> dict[str, Model]:
    """``X^T X`` of every task, for retex."""
    return {task: {n: x.T @ x for n, x in rows.items()} for task, rows in given.inputs.items()}


Theirs = Callable[[Path, Given], Model]


def matrices(run: Theirs) -> Theirs:
    """Their code on convolutions as matrices."""
    return lambda root, given: run(root, given.as_matrices())


@dataclass(frozen=True)
class Row:
    """One comparison: ``run`` is their code as the paper has it, ``released`` theirs untouched where that differs."""

    label: str
    repository: str
    file: str
    run: Theirs
    method: str
    options: Mapping[str, object] = field(default_factory=dict)
    given: Callable[[], Given] = make
    note: str = ""
    released: Theirs | None = None


ONE_MORE = "their threshold keeps one entry more than the share says: one less was asked for here"
CONVOLUTIONS = "their code averages convolutions; retex takes them as d_out x rest, as theirs was given them here"
FEW = "fewer rows than outputs: unit vectors fill up their basis, are not orthogonal to it, and tasks' norms grow"
FUSION = "FusionBench's: the authors' own repository has no code"
ROWS = (
    Row("ties", "prateeky2806/ties-merging", "src/utils/merge_utils.py", code.ties, "ties",
        note=ONE_MORE, released=code.ties_released),
    Row("breadcrumbs", "rezazzr/breadcrumbs", "src/task_vectors.py", code.breadcrumbs, "breadcrumbs", {"alpha": 1.0},
        note="their code takes the shares of each row, the paper of each layer: theirs got tensors as single rows here",
        released=code.breadcrumbs_rows),
    Row("model_stock", "tanganke/fusion_bench", "fusion_bench/method/model_stock/model_stock.py",
        code.model_stock, "model_stock", given=lambda: two(make()), note=f"two experts; {FUSION}"),
    Row("model_stock, four experts", "tanganke/fusion_bench", "fusion_bench/method/model_stock/model_stock.py",
        code.model_stock, "model_stock", note="FusionBench takes the mean angle of all pairs, retex the mean cosine"),
    Row("pcb", "duguodong7/pcb-merging", "pcb-merging.py", code.pcb, "pcb",
        note="the vision script there is another: normalised before the sum, 1 % clamped, 5 % kept, times 1.2"),
    Row("consensus", "nik-dim/tall_masks", "src/utils/tallmask_utils.py", code.consensus, "consensus", {"alpha": 1.0},
        note="they choose each task's lambda on labelled data; 0.4 for all here"),
    Row("emr", "harveyhuang18/EMR_Merging", "merge_vit/src/main_emr_merging.py", code.emr, "emr",
        note="an entry whose sum is exactly 0 is elected negative; retex leaves the base's"),
    Row("tsv_m", "AntoAndGar/task_singular_vectors", "src/utils/TSVM_utils.py", matrices(code.tsv_m), "tsv_m",
        note=CONVOLUTIONS, released=code.tsv_m),
    Row("iso_c", "danielm1405/iso-merging", "src/utils/iso.py",
        matrices(partial(code.iso, name="iso_c")), "iso_c",
        note=CONVOLUTIONS, released=partial(code.iso, name="iso_c")),
    Row("iso_cts", "danielm1405/iso-merging", "src/utils/iso.py",
        matrices(partial(code.iso, name="iso_cts")), "iso_cts",
        note=CONVOLUTIONS, released=partial(code.iso, name="iso_cts")),
    Row("knots", "gstoica27/KnOTS", "task_merger.py", code.knots, "knots", given=lambda: make(low_rank=True),
        note=f"top 20 % of all tensors together there, of each in retex: theirs got one at a time; {ONE_MORE}",
        released=code.knots_released),
    Row("doge", "tanganke/fusion_bench", "fusion_bench/method/doge_ta/doge_ta.py", code.doge, "doge",
        given=lambda: make().some([n for n in SHAPES if ".0." in n], TASKS),
        note=f"as the first author contributed it; {ONE_MORE}", released=code.doge_released),
    Row("lines, on ties", "wang-kee/LiNeS", "src/eval/eval.py", code.lines, "ties", {"lines": 0.5},
        note=ONE_MORE),
    Row("fisher", "mmatena/model_merging", "model_merging/merging.py", code.fisher, "fisher",
        note="their default floors the Fisher information of the first model alone, retex that of all",
        released=partial(code.fisher, favour_first=True)),
    Row("regmean", "bloomberg/dataless-model-merging", "src/model_merge/avg_merger.py", code.regmean, "regmean",
        given=lambda: for_roberta(make()), released=partial(code.regmean, mean=True),
        note="they divide each task's Gram matrices by its rows (120 to 400 here); retex, as the paper, does not"),
    Row("esm, vision", "kiddo127/ESM", "ESM-ViT/src/utils/esm_utils.py", matrices(code.esm_vision), "esm",
        given=lambda: for_vision(make()), note=f"{CONVOLUTIONS}; they merge attention's output by TSV-M",
        released=code.esm_vision),
    Row("esm, vision, few inputs", "kiddo127/ESM", "ESM-ViT/src/utils/esm_utils.py", matrices(code.esm_vision), "esm",
        given=lambda: for_vision(make(), 80), note=FEW),
    Row("esm, RoBERTa", "kiddo127/ESM", "ESM-RoBERTa/merge.py", matrices(code.esm_roberta), "esm",
        {"variant": "roberta"}, given=lambda: for_roberta(make())),
)  # fmt: skip


def main() -> None:
    """Get what is missing, merge twice, compare, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repositories", type=Path, default=record.ROOT / ".peers" / "authors")
    parser.add_argument("rows", nargs="*", help="only these rows, and nothing is recorded")
    given = parser.parse_args()
    torch.set_num_threads(1)
    roots = {name: checkout(given.repositories, name) for name in COMMITS}
    rows = [compare(row, roots[row.repository]) for row in ROWS if not given.rows or row.label in given.rows]
    for row in rows:
        print(json.dumps(row))
    if not given.rows:
        record.write("authors", {"same": SAME, "rows": rows})


def checkout(folder: Path, repository: str) -> Path:
    """A clone of the repository at its commit, made if it is not there."""
    root, commit = folder / repository.replace("/", "__"), COMMITS[repository]
    if not root.is_dir():
        url = f"https://github.com/{repository}"
        subprocess.run(["git", "clone", "--quiet", "--filter=blob:none", url, root], check=True)
        subprocess.run(["git", "-C", root, "checkout", "--quiet", commit], check=True)
    here = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    if here.stdout.strip() != commit:
        sys.exit(f"{root} is not at commit {commit}")
    return root


def compare(row: Row, root: Path) -> dict[str, object]:
    """One row of the table."""
    given = row.given()
    needs = find_method(row.method).needs
    statistics = given.fishers if needs == "fisher" else grams(given) if needs == "grams" else None
    merged = merge_tensors(row.method, given.base, given.experts, row.options, statistics=statistics)
    ours = {n: merged[n].double() - given.base[n].double() for n in given.base}
    found: dict[str, object] = {"method": row.label, "repository": row.repository, "file": row.file}
    found["commit"] = COMMITS[row.repository]
    for dtype in (torch.float32, torch.float64):
        theirs = quietly(row.run, root, given.to(dtype))
        found[str(dtype).removeprefix("torch.")] = difference(ours, theirs)
    if row.released is not None:
        theirs = quietly(row.released, root, given)
        mine, other = (torch.cat([model[n].double().flatten() for n in ours]) for model in (ours, theirs))
        found["released"] = ((mine - other).norm() / other.norm()).item()
    return found | {"note": row.note}


def quietly(run: Theirs, root: Path, given: Given) -> Model:
    """Their merge without what they print."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return run(root, given)


def difference(ours: Model, theirs: Model) -> dict[str, float]:
    """The worst entry relative to the largest of its tensor, and the share of all that are no rounding."""
    worst, beyond = 0.0, 0
    for name, merged in ours.items():
        apart = (theirs.get(name, torch.zeros_like(merged)).double().flatten() - merged.flatten()).abs()
        relative = apart / merged.abs().max().clamp(min=1e-30)
        worst, beyond = max(worst, relative.max().item()), beyond + int((relative > SAME).sum())
    return {"worst": worst, "beyond": beyond / sum(merged.numel() for merged in ours.values())}


if __name__ == "__main__":
    main()
