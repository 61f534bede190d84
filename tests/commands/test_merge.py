"""``retex merge`` on files: what is matched, written, remembered and refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from retex_cli.commands.merge import MergeConfig, plan, run
from retex_cli.errors import RetexError, UsageError
from retex_cli.merging.table import METHODS

Model = dict[str, Tensor]


def bert_like(seed: int = 0, prefix: str = "", near: Model | None = None) -> Model:
    """A few tensors named as an encoder's; ``near`` a base (whatever its prefix) or drawn from scratch."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "embeddings.word.weight": (40, 8),
        "encoder.layer.0.attention.query.weight": (8, 8),
        "encoder.layer.0.attention.query.bias": (8,),
        "encoder.layer.0.output.LayerNorm.weight": (8,),
        "encoder.layer.1.dense.weight": (1,),
    }
    noise = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    if near is not None:
        noise = {name: near[name] + 0.05 * value for name, value in noise.items()}
    return {prefix + name: value for name, value in noise.items()}


@pytest.fixture
def store(tmp_path: Path) -> Callable[..., str]:
    """``store("base", tensors, config={...})`` -> path of a model folder."""

    def put(name: str, tensors: Model, config: dict[str, object] | None = None, **files: str) -> str:
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config or {"model_type": "bert"}))
        for file, text in files.items():
            (folder / file.replace("__", ".")).write_text(text)
        return str(folder)

    return put


@pytest.fixture
def family(store: Callable[..., str]) -> dict[str, str]:
    """A bare base with an integer buffer, and two prefixed experts with heads of their own and without the buffer."""
    base = bert_like()
    with_buffer = {**base, "embeddings.position_ids": torch.arange(6).view(1, 6)}
    cars, dtd = (bert_like(seed, "bert.", near=base) for seed in (1, 2))
    return {
        "base": store("base", with_buffer, tokenizer__json="{}"),
        "cars": store("cars", {**cars, "classifier.weight": torch.ones(3, 8), "classifier.bias": torch.ones(3)}),
        "dtd": store("dtd", {**dtd, "classifier.weight": torch.ones(5, 8), "classifier.bias": torch.ones(5)}),
    }


def config(family: dict[str, str], output: Path | str, **settings: object) -> MergeConfig:
    experts = {task: reference for task, reference in family.items() if task != "base"}
    return MergeConfig(base=family["base"], experts=experts, output=str(output), device="cpu", **settings)  # type: ignore[arg-type]


class Notes:
    """Progress that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps = 0
        self.total = 0

    def start(self, label: str, total: int) -> None:
        self.total += total

    def advance(self, steps: int = 1) -> None:
        self.steps += steps

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_shared_tensors_are_merged_under_the_bases_names_and_the_rest_is_accounted_for(
    family: dict[str, str], tmp_path: Path
) -> None:
    report = run(plan(config(family, tmp_path / "merged")))
    merged, base = load_file(tmp_path / "merged/model.safetensors"), load_file(family["base"] + "/model.safetensors")
    cars, dtd = (load_file(family[task] + "/model.safetensors") for task in ("cars", "dtd"))
    assert set(merged) == set(base)
    for name in base:
        if name == "embeddings.position_ids":
            assert torch.equal(merged[name], base[name])
        else:
            torch.testing.assert_close(merged[name], (cars["bert." + name] + dtd["bert." + name]) / 2)
    found = report.to_json()
    assert found["tensors"] == {
        "total": 6,
        "merged": 5,
        "copied": ["embeddings.position_ids"],
        "partly": {},
        "aliases": {},
    }
    account = found["experts"]["cars"]  # type: ignore[index]
    assert (account["merged"], account["task_tensors"]) == (5, ["classifier.bias", "classifier.weight"])
    assert account["prefix"] == ["", "bert."]
    assert account["lacks"] == ["embeddings.position_ids"]
    assert 0.01 < account["task_vector_ratio"] < 0.2
    text = "\n".join(report.lines())
    assert "prefix its 'bert.' is removed" in text
    assert "copied from the base, as no expert has a version to merge: embeddings.position_ids" in text
    assert "cars: task tensors, left to the offsets: classifier.bias, classifier.weight" in text


@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties", "dare", "dare_ties"])
def test_same_bytes_whatever_the_threads_and_the_order(method: str, family: dict[str, str], tmp_path: Path) -> None:
    backwards = dict(reversed(family.items()))
    for name, models, threads in (("one", family, 1), ("two", backwards, 3)):
        run(plan(config(models, tmp_path / f"{name}.safetensors", method=method, threads=threads)))
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_the_header_remembers_the_whole_recipe(family: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "merged.safetensors"
    overrides = {"*.bias": {"density": 0.5}}
    report = run(plan(config(family, out, method="ties", options={"alpha": 0.7}, overrides=overrides, seed=3)))
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["retex.format"]) == ("pt", "retex.merged")
    recipe = json.loads(metadata["retex.recipe"])
    assert recipe["method"] == "ties"
    assert recipe["options"] == METHODS["ties"].resolve({"alpha": 0.7})
    assert recipe["overrides"] == overrides
    assert recipe["seed"] == 3
    digest = hashlib.sha256(Path(family["cars"], "model.safetensors").read_bytes()).hexdigest()
    assert recipe["experts"]["cars"] == {
        "reference": family["cars"],
        "revision": None,
        "files": {"model.safetensors": digest},
    }
    assert digest in report.to_json()["sha256"].values()  # type: ignore[attr-defined]
    assert "pending" not in metadata["retex.recipe"]


def test_what_an_option_gives_to_single_tasks_is_remembered_task_by_task(
    family: dict[str, str], tmp_path: Path
) -> None:
    out, options = tmp_path / "merged.safetensors", {"weight": {"cars": 3}}
    made = plan(config(family, out, method="average", options=options))
    assert "weight={cars: 3, dtd: 1}" in made.report().lines()[0]
    run(made)
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["retex.recipe"])["options"]["weight"] == {"cars": 3.0, "dtd": 1.0}
    name = "encoder.layer.0.attention.query.weight"
    cars, dtd = (load_file(family[task] + "/model.safetensors")["bert." + name] for task in ("cars", "dtd"))
    torch.testing.assert_close(load_file(out)[name], (3 * cars + dtd) / 4)


def test_an_option_for_a_task_that_is_not_merged_is_refused(family: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="names the task 'car'") as caught:
        plan(config(family, tmp_path / "m", method="ties", options={"density": {"car": 0.5}}))
    assert "cars" in str(caught.value.hint)


def test_the_base_may_be_an_expert_too(family: dict[str, str], tmp_path: Path) -> None:
    report = run(plan(config({**family, "self": family["base"]}, tmp_path / "merged")))
    assert report.ratios["self"] == 0.0


def test_a_folder_carries_side_files_and_a_model_card(family: dict[str, str], tmp_path: Path) -> None:
    run(plan(config(family, tmp_path / "merged", method="ties", dtype="bf16")))
    folder = tmp_path / "merged"
    names = {path.name for path in folder.iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    assert json.loads((folder / "config.json").read_text()) == {"model_type": "bert", "dtype": "bfloat16"}
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n")
    for words in ("- merge", "library_name: transformers", "https://arxiv.org/abs/2306.01708", family["cars"]):
        assert words in card
    assert hashlib.sha256(Path(family["dtd"], "model.safetensors").read_bytes()).hexdigest() in card
    merged = load_file(folder / "model.safetensors")
    assert merged["embeddings.word.weight"].dtype == torch.bfloat16
    assert merged["embeddings.position_ids"].dtype == torch.int64


def test_hub_references_become_tags_of_the_model_card(family: dict[str, str], tmp_path: Path) -> None:
    from dataclasses import replace

    from retex_cli.commands.merge import _recipe
    from retex_cli.commands.merge_inputs import Prepared
    from retex_cli.commands.merge_report import model_card

    made = plan(config(family, tmp_path / "merged"))
    made.base.reference = "org/base@v1"
    card = model_card(_recipe(replace(made), Prepared(made.steps, {}), None), "merged")
    assert "base_model:\n- org/base\n" in card
    assert "base_model_relation: merge" in card


def test_standard_output_is_the_same_file(
    family: dict[str, str], tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    run(plan(config(family, tmp_path / "merged.safetensors")))
    capfdbinary.readouterr()
    run(plan(config(family, "-")))
    assert capfdbinary.readouterr().out == (tmp_path / "merged.safetensors").read_bytes()


def test_a_dry_run_tells_and_writes_nothing(family: dict[str, str], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    report = plan(config(family, tmp_path / "merged", method="ties")).report()
    assert sorted(tmp_path.rglob("*")) == before
    assert report.to_json()["seconds"] is None
    base = load_file(family["base"] + "/model.safetensors")
    assert report.to_json()["bytes_out"] == sum(tensor.nbytes for tensor in base.values())
    assert "would read" in report.lines()[-1]


def test_defaults_that_nobody_gave_are_said_with_their_paper(family: dict[str, str], tmp_path: Path) -> None:
    progress = Notes()
    run(plan(config(family, tmp_path / "merged", method="ties", options={"density": 0.3})), progress)
    said = "ties: alpha=1.0, scope=global, weight=1.0, normalise=True, cancelled=zero"
    assert progress.notes == [f"{said} (default, from https://arxiv.org/abs/2306.01708)"]
    assert progress.steps == progress.total == 7, "six tensors, and a first pass in one step"


def test_overrides_apply_to_the_tensors_that_match(family: dict[str, str], tmp_path: Path) -> None:
    overrides = {"*.bias": {"alpha": 0.0}}
    run(plan(config(family, tmp_path / "m.safetensors", method="task_arithmetic", overrides=overrides)))
    merged, base = load_file(tmp_path / "m.safetensors"), load_file(family["base"] + "/model.safetensors")
    name = "encoder.layer.0.attention.query."
    assert torch.equal(merged[name + "bias"], base[name + "bias"])
    assert not torch.equal(merged[name + "weight"], base[name + "weight"])


def test_a_grown_vocabulary_is_merged_as_far_as_the_base_goes(store: Callable[..., str], tmp_path: Path) -> None:
    name = "embeddings.word_embeddings.weight"
    base = {name: torch.randn(10, 4), "encoder.weight": torch.randn(4, 4)}
    grown = {name: torch.cat([base[name] + 0.1, torch.ones(3, 4)]), "encoder.weight": base["encoder.weight"]}
    models = {
        "base": store("base", base, {"vocab_size": 10}),
        "a": store("a", grown, {"vocab_size": 13}),
        "b": store("b", base, {"vocab_size": 10}),
    }
    report = run(plan(config(models, tmp_path / "m.safetensors")))
    merged = load_file(tmp_path / "m.safetensors")
    torch.testing.assert_close(merged[name], base[name] + 0.05)
    assert report.to_json()["experts"]["a"]["rows"] == {name: [10, 13]}  # type: ignore[index]
    assert f"a: {name} has 3 extra rows, left to the offsets; the first 10 are merged" in report.lines()


def test_an_output_layer_of_another_size_is_merged_from_those_that_share_it(
    store: Callable[..., str], tmp_path: Path
) -> None:
    base = {"encoder.weight": torch.randn(4, 4), "classifier.weight": torch.randn(2, 4)}
    other = {"encoder.weight": base["encoder.weight"] + 0.1, "classifier.weight": torch.randn(7, 4)}
    same = {"encoder.weight": base["encoder.weight"], "classifier.weight": base["classifier.weight"] + 0.1}
    models = {"base": store("base", base), "a": store("a", other), "b": store("b", same)}
    report = run(plan(config(models, tmp_path / "m.safetensors")))
    merged = load_file(tmp_path / "m.safetensors")
    torch.testing.assert_close(merged["classifier.weight"], same["classifier.weight"])
    assert report.to_json()["tensors"]["partly"] == {"classifier.weight": ["b"]}  # type: ignore[index]
    assert report.to_json()["experts"]["a"]["task_tensors"] == ["classifier.weight"]  # type: ignore[index]


def test_half_precision_is_merged_in_single(store: Callable[..., str], tmp_path: Path) -> None:
    """In bfloat16 itself 1 + 1/512 + 1/512 would stay 1; in float32 it is 1 + 1/256, the mean of the two experts."""
    base = {"w": torch.ones(4, 4, dtype=torch.bfloat16)}
    up = {"w": torch.full((4, 4), 1 + 1 / 128, dtype=torch.bfloat16)}
    models = {"base": store("base", base), "a": store("a", up), "b": store("b", base)}
    run(plan(config(models, tmp_path / "m.safetensors", dtype="fp32")))
    assert load_file(tmp_path / "m.safetensors")["w"].unique().tolist() == [1 + 1 / 256]


def test_experts_of_another_base_are_refused_by_their_norms(
    family: dict[str, str], store: Callable[..., str], tmp_path: Path
) -> None:
    stranger = {**family, "alien": store("alien", bert_like(9))}
    with pytest.raises(RetexError, match=r"expert 'alien' .* was not tuned from the base .*norm [\d.]+ against [\d.]+"):
        run(plan(config(stranger, tmp_path / "merged")))
    assert not (tmp_path / "merged").exists()
    run(plan(config(stranger, tmp_path / "m.safetensors", allow_unrelated=True)))
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert json.loads(file.metadata()["retex.recipe"])["allow_unrelated"] is True


@pytest.mark.parametrize("broken", ["base", "cars"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_names_file_and_tensor(
    broken: str, value: float, family: dict[str, str], tmp_path: Path
) -> None:
    file = Path(family[broken], "model.safetensors")
    tensors = load_file(file)
    name = ("" if broken == "base" else "bert.") + "encoder.layer.0.attention.query.bias"
    tensors[name][5] = value
    save_file(tensors, file)
    with pytest.raises(RetexError) as caught:
        run(plan(config(family, tmp_path / "merged", method="ties")))
    assert f"{file}: tensor {name!r} holds {value} at element 5" in caught.value.message
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "tie"}, "unknown merge method 'tie'"),
        ({"method": "ties", "options": {"densty": 1}}, "no option 'densty'"),
        ({"method": "ties", "overrides": {"*.bias": {"scop": 1}}}, "no option 'scop'"),
        ({"method": "ties", "overrides": {"*.biases": {"density": 1}}}, r"no merged tensor matches .*'\*.biases'"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"dtype": "int8"}, "int8"),
        ({"max_memory": 1000}, "--max-memory 1,000 is too little"),
        ({"experts": {}}, "there is no expert to merge"),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error(
    settings: dict[str, object], words: str, family: dict[str, str], tmp_path: Path
) -> None:
    from dataclasses import replace

    with pytest.raises(UsageError, match=words):
        plan(replace(config(family, tmp_path / "merged"), **settings))  # type: ignore[arg-type]
    assert not (tmp_path / "merged").exists()


def test_an_output_that_exists_or_is_an_input_is_refused(family: dict[str, str], tmp_path: Path) -> None:
    run(plan(config(family, tmp_path / "merged")))
    with pytest.raises(RetexError, match="already exists"):
        plan(config(family, tmp_path / "merged"))
    run(plan(config(family, tmp_path / "merged", overwrite=True)))
    with pytest.raises(RetexError, match="also an input"):
        plan(config(family, family["cars"], overwrite=True))


def test_an_adapter_is_merged_as_the_expert_that_it_makes_of_the_base(
    store: Callable[..., str], tmp_path: Path
) -> None:
    draw = torch.Generator().manual_seed(0)
    base = {f"layer.{i}.query.weight": torch.randn(8, 8, generator=draw) for i in range(2)}
    a, b = torch.randn(2, 8, generator=draw), torch.randn(8, 2, generator=draw)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query"], "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    prefix = "base_model.model.layer.1.query."
    save_file({prefix + "lora_A.weight": 0.1 * a, prefix + "lora_B.weight": b}, adapter / "adapter_model.safetensors")
    models = {"base": store("base", base), "lora": str(adapter)}
    run(plan(config(models, tmp_path / "m.safetensors", method="task_arithmetic", options={"alpha": 0.5})))
    merged = load_file(tmp_path / "m.safetensors")
    assert torch.equal(merged["layer.0.query.weight"], base["layer.0.query.weight"])
    wanted = base["layer.1.query.weight"] + 0.5 * 2 * 0.1 * (b @ a)
    torch.testing.assert_close(merged["layer.1.query.weight"], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_on_files_or_says_what_it_lacks(method: str, family: dict[str, str], tmp_path: Path) -> None:
    """Two prefixed experts with an integer buffer left out: loaded again, every tensor is finite and as the base's."""
    if METHODS[method].needs_inputs:
        with pytest.raises(UsageError, match="task 'cars' has no inputs"):
            plan(config(family, tmp_path / "m.safetensors", method=method))
        return
    run(plan(config(family, tmp_path / "m.safetensors", method=method)))
    merged, base = load_file(tmp_path / "m.safetensors"), load_file(family["base"] + "/model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in merged.items()} == {n: (t.shape, t.dtype) for n, t in base.items()}
    assert all(tensor.isfinite().all() for tensor in merged.values())
    changed = sum(not torch.equal(merged[name], base[name]) for name in base)
    assert changed >= 1, "the merge is not the base"


def test_slerp_refuses_more_than_two(family: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'slerp' merges two experts, 3 are given: again, cars, dtd"):
        plan(config({**family, "again": family["cars"]}, tmp_path / "m.safetensors", method="slerp"))


def test_less_memory_gives_the_same_bytes(family: dict[str, str], tmp_path: Path) -> None:
    for name, limit in (("much", None), ("little", 60_000_000)):
        run(plan(config(family, tmp_path / f"{name}.safetensors", method="ties", max_memory=limit, threads=1)))
    assert (tmp_path / "much.safetensors").read_bytes() == (tmp_path / "little.safetensors").read_bytes()
