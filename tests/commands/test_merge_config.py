"""What mergekit's file asks for, as a merge: every rule, every refusal, and tensors worked by hand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from retex_cli.commands.merge import MergeConfig, plan, run
from retex_cli.commands.merge_config import from_mergekit
from retex_cli.commands.mergekit_rules import RULES
from retex_cli.errors import RetexError, UsageError
from retex_cli.merging.table import METHODS

NAMES = ("embed.weight", "layers.0.mlp.weight", "layers.1.attn.weight", "layers.2.mlp.weight", "norm.weight")
BASE = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
A = torch.tensor([[4.0, -1.0], [2.0, 0.0]])
B = torch.tensor([[-2.0, 3.0], [2.0, 1.0]])


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders base, a and b with five 2 x 2 tensors in three layers; the current directory."""
    monkeypatch.chdir(tmp_path)
    for name, tau in (("base", 0 * A), ("a", A), ("b", B)):
        (tmp_path / name).mkdir()
        tensors = {n: torch.add(10 * BASE, tau) for n in NAMES}
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


Read = Callable[[str], MergeConfig]


@pytest.fixture
def read(workplace: Path) -> Read:
    def read(text: str) -> MergeConfig:
        (workplace / "theirs.yml").write_text(text)
        return replace(from_mergekit("theirs.yml", MergeConfig("", {}, "out", device="cpu"))[0], config=None)

    return read


def yml(method: str, a: str = "{weight: 1}", b: str = "{weight: 1}", top: str = "{}", base: str = "base") -> str:
    return (
        f"merge_method: {method}\nbase_model: {base}\nparameters: {top}\n"
        f"models:\n- {{model: base}}\n- {{model: a, parameters: {a}}}\n- {{model: b, parameters: {b}}}\n"
    )


def tau_of(config: MergeConfig, name: str = "norm.weight") -> list[float]:
    """The merged task vector of one tensor."""
    run(plan(config))
    merged = load_file("out/model.safetensors")
    return [round(value, 4) for value in (merged[name] - 10 * BASE).flatten().tolist()]


@pytest.mark.parametrize(
    ("text", "tau"),
    [
        (yml("linear", top="{weight: 1}"), [(4 - 2) / 3, 2 / 3, 4 / 3, 1 / 3]),  # the base is one of three models
        (yml("task_arithmetic", "{weight: 2}", "{weight: 0.5}"), [7.0, -0.5, 5.0, 0.5]),
        (yml("task_arithmetic", "{weight: 2}", "{weight: 0.5}", "{normalize: true}"), [2.8, -0.2, 2.0, 0.2]),
        (yml("ties", b="{weight: 3}"), [-2.0, 3.0, 2.0, 1.0]),
        (yml("ties", "{weight: 1, density: 0.25}", "{weight: 3}", "{normalize: false}"), [-6.0, 9.0, 6.0, 3.0]),
        (yml("ties", b="{weight: 2}", top="{lambda: 0.5}"), [2.0, 1.5, 1.0, 0.5]),  # 4 - 4 counts as positive
        (yml("dare_linear", b="{weight: 2}"), [0.0, 5.0, 6.0, 2.0]),
        (yml("dare_ties", b="{weight: 2}"), [4.0, 6.0, 6.0, 2.0]),
        (yml("della", b="{weight: 3}"), [-2.0, 3.0, 2.0, 1.0]),
        (yml("della_linear", b="{weight: 2}"), [0.0, 5.0, 6.0, 2.0]),
        (yml("breadcrumbs", "{weight: 1, density: 0.5, gamma: 0.25}", "{weight: 1, density: 0.5}"),
         [-2.0, 2.0, 4.0, 0.0]),
        (yml("breadcrumbs", top="{gamma: 0.5}"), [2.0, 2.0, 4.0, 1.0]),  # at density 1 nothing goes
        (yml("breadcrumbs_ties", b="{weight: 2}"), [4.0, 6.0, 6.0, 2.0]),
        (yml("sce", "{}", "{}", "{select_topk: 0.5}"), [4.0, 0.0, 0.0, 0.0]),
    ],
)  # fmt: skip
def test_tensors_worked_by_hand(read: Read, text: str, tau: list[float]) -> None:
    assert tau_of(read(text)) == pytest.approx(tau, abs=2e-4)


def test_slerp_goes_from_the_base_whatever_the_names(read: Read, workplace: Path) -> None:
    text = "merge_method: slerp\nbase_model: {0}\nparameters: {{t: 0.25}}\nmodels: [{{model: {0}}}, {{model: {1}}}]\n"
    forward, backward = read(text.format("a", "b")), read(text.format("b", "a"))
    assert (forward.options["t"], backward.options["t"]) == (0.25, 0.75)
    assert forward.experts == {"a": "a", "b": "b"} == backward.experts
    assert (forward.base, backward.base) == ("a", "b")
    tau_of(forward)
    first, second = load_file("a/model.safetensors")["norm.weight"], load_file("b/model.safetensors")["norm.weight"]
    cosine = (first * second).sum() / first.norm() / second.norm()
    angle = torch.acos(cosine)
    wanted = (torch.sin(0.75 * angle) * first + torch.sin(0.25 * angle) * second) / torch.sin(angle)
    if cosine > 0.9995:
        wanted = 0.75 * first + 0.25 * second
    torch.testing.assert_close(load_file("out/model.safetensors")["norm.weight"], wanted)


def test_lists_are_spread_over_the_layers_and_the_first_filter_decides(read: Read) -> None:
    config = read(yml("ties", "{weight: [{filter: mlp, value: [0, 1]}, {filter: norm, value: 9}, {value: [2, 3, 5]}]}"))
    weights = dict.fromkeys(NAMES, 2.0) | {
        "layers.0.mlp.weight": 0.0, "layers.1.attn.weight": 3.0, "layers.2.mlp.weight": 1.0, "norm.weight": 9.0,
    }  # fmt: skip
    for name, weight in weights.items():
        options = {**config.options, **config.overrides.get(name, {})}
        given = options["weight"]
        assert (given["a"] if isinstance(given, dict) else given) == weight, name
        assert (given["b"] if isinstance(given, dict) else 1.0) == 1.0
    assert config.options["density"] == 1.0
    assert tau_of(config, "layers.0.mlp.weight") == B.flatten().tolist(), "a weighs nothing there"


def test_an_only_layer_takes_the_last_value_and_a_slice_its_own_parameters(read: Read, workplace: Path) -> None:
    for name in ("base", "a"):
        file = workplace / name / "model.safetensors"
        tensors = {n: t.clone() for n, t in load_file(file).items() if ".1." not in n and ".2." not in n}
        save_file(tensors, file, metadata={"format": "pt"})
    config = read(
        "merge_method: slerp\nbase_model: base\nparameters: {t: 0.9}\nslices:\n- sources:\n"
        "  - {model: base, layer_range: [0, 1]}\n  - {model: a, layer_range: [0, 1]}\n  parameters: {t: [0.1, 0.4]}\n"
    )
    # ours counts from a, the first by name, on
    assert config.options["t"] == 0.9
    assert config.overrides == {"layers.0.mlp.weight": {"t": 0.6}}


def test_parameters_are_looked_up_from_near_to_far(read: Read) -> None:
    config = read(yml("ties", "{weight: [{filter: mlp, value: 7}]}", "{}", "{weight: 3, density: 0.5}"))
    assert config.overrides == {name: {"weight": {"a": 7.0, "b": 3.0}} for name in NAMES if "mlp" in name}
    assert (config.options["weight"], config.options["density"]) == (3.0, 0.5)


def test_every_rule_leads_to_a_method_and_to_options_that_it_has() -> None:
    for theirs, rule in RULES.items():
        method = METHODS[rule.method]
        ours = {name for name, _ in (*rule.shared.values(), *rule.each.values())} - {"filter_wise", "rescale"}
        if rule.method == "slerp":
            assert ours == {"t"}
        assert set(method.resolve({**rule.fixed})) >= ours, theirs


def test_random_methods_are_rescaled_as_mergekit_does(read: Read) -> None:
    config = read(yml("della", "{weight: 1, density: 0.5, epsilon: 0.2}", "{weight: 1}"))
    assert config.options["rescale"] == "l1"
    assert config.options["window"] == {"a": 0.4, "b": 0.0}, "nothing is dropped at density 1"
    assert read(yml("dare_linear", top="{rescale: false}")).options["rescale"] == "off"


def test_types(read: Read, workplace: Path) -> None:
    assert read(yml("ties")).dtype is None
    assert read(yml("ties") + "dtype: bfloat16\n").dtype == "bfloat16"
    assert read(yml("ties") + "dtype: bfloat16\nout_dtype: torch.float32\n").dtype == "float32"
    base = load_file("base/model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in base.items()}, "base/model.safetensors", {"format": "pt"})
    assert read(yml("ties")).dtype == "float32", "mergekit writes the widest type of the inputs"


def test_the_recipe_keeps_the_file_and_says_what_was_chosen(workplace: Path) -> None:
    text = yml("ties", "{weight: 0.5}", top="{int8_mask: true}") + "tokenizer_source: base\n"
    (workplace / "theirs.yml").write_text(text)
    planned = plan(MergeConfig("", {}, "out", device="cpu", config="theirs.yml"))
    assert planned.origin is not None
    semantics, unused, tokenizer = planned.origin.notes
    assert "theirs.yml: ties as mergekit computes it" in semantics
    assert "top-k per tensor" in semantics
    assert "parameters.int8_mask has no effect with ties" in unused
    assert "tokenizer_source" in tokenizer
    digest = hashlib.sha256(text.encode()).hexdigest()
    dry = planned.report()
    assert f"read from theirs.yml, SHA-256 {digest}" in "\n".join(dry.lines())
    assert "weight={a: 0.5, b: 1}" in "\n".join(dry.lines())
    run(planned)
    with safe_open("out/model.safetensors", "pt") as file:
        recipe = json.loads(file.metadata()["retex.recipe"])
    assert recipe["config"] == {"path": "theirs.yml", "sha256": digest, "notes": [semantics, unused, tokenizer]}
    assert recipe["config"] == dry.to_json()["config"]
    assert recipe["options"] == {
        "density": 1.0, "alpha": 1.0, "scope": "tensor", "weight": {"a": 0.5, "b": 1.0}, "normalise": True,
        "cancelled": "plus",
    }  # fmt: skip


def test_an_adapter_on_the_base_is_an_expert(read: Read, workplace: Path) -> None:
    """Rank 1, alpha 2: B A times 2."""
    (workplace / "tuned").mkdir()
    key = "base_model.model.layers.0.mlp.lora_{}.weight"
    factors = {key.format("A"): torch.tensor([[1.0, 2.0]]), key.format("B"): torch.tensor([[0.5], [1.0]])}
    save_file(factors, "tuned/adapter_model.safetensors")
    (workplace / "tuned" / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 2, "r": 1}')
    config = read(yml("task_arithmetic", b="{weight: 3}").replace("model: a,", "model: base+tuned,"))
    assert config.experts == {"tuned": "tuned", "b": "b"}
    wanted = 3 * B + 2 * torch.tensor([[0.5, 1.0], [1.0, 2.0]])
    assert tau_of(config, "layers.0.mlp.weight") == wanted.flatten().tolist()
    assert tau_of(replace(config, overwrite=True), "norm.weight") == (3 * B).flatten().tolist()


def test_what_the_base_lacks_is_named_as_left_out(workplace: Path) -> None:
    expert = load_file("a/model.safetensors")
    grown = {**expert, "lm_head.weight": torch.ones(2, 2), "embed.weight": torch.ones(2, 2)}
    save_file(grown, "a/model.safetensors", {"format": "pt"})
    (workplace / "theirs.yml").write_text(yml("ties"))
    origin = plan(MergeConfig("", {}, "out", device="cpu", config="theirs.yml")).origin
    assert origin is not None
    assert origin.notes[-1] == "a: not in the base and not merged: lm_head.weight"


def test_nothing_else_may_say_what_is_merged(workplace: Path) -> None:
    (workplace / "theirs.yml").write_text(yml("ties"))
    with pytest.raises(UsageError, match=r"theirs\.yml says what is merged"):
        plan(MergeConfig("base", {"a": "a"}, "out", config="theirs.yml"))


def test_a_tensor_that_is_not_merged_may_have_options_of_its_own(workplace: Path) -> None:
    """The base's extra tensor has a counterpart in no expert; the filter gives it options all the same."""
    base = load_file("base/model.safetensors")
    save_file({**base, "mlp.inv_freq.weight": torch.ones(2)}, "base/model.safetensors", {"format": "pt"})
    (workplace / "theirs.yml").write_text(yml("ties", "{weight: [{filter: inv_freq, value: 3}, {value: 1}]}"))
    settings = MergeConfig("", {}, "out", device="cpu", config="theirs.yml", allow_missing=("*.inv_freq.*",))
    run(plan(settings))
    assert torch.equal(load_file("out/model.safetensors")["mlp.inv_freq.weight"], torch.ones(2))


def test_names_of_tasks_are_unique(read: Read, workplace: Path) -> None:
    for place in ("x/last", "y/last", "z/auto"):
        (workplace / place).mkdir(parents=True)
        save_file(load_file("a/model.safetensors"), workplace / place / "model.safetensors", {"format": "pt"})
    models = ", ".join(f"{{model: {place}}}" for place in ("x/last", "y/last/", "z/auto"))
    config = read(f"merge_method: linear\nmodels: [{models}]\nparameters: {{weight: 1}}\n")
    assert config.experts == {"last": "x/last", "last-2": "y/last/", "auto-2": "z/auto"}
    assert config.base == "x/last", "without base_model the first model gives shape and tokenizer"


@pytest.mark.parametrize(
    ("text", "words", "hint"),
    [
        (yml("tie"), "merge_method 'tie' has no counterpart", "ties"),
        (yml("nearswap"), "merge_method 'nearswap' has no counterpart", "retex reads linear, slerp"),
        (yml("ties", "{weight: 1, densty: 0.5}"), r"models\[1\].parameters.densty is not a parameter", "density"),
        (yml("ties", top="{normalise: true}"), "parameters.normalise is not a parameter", "normalize"),
        (yml("ties", "{weight: 1, lambda: 0.5}"), r"models\[1\].parameters.lambda is not read there", "at the top"),
        (yml("ties", "{density: 0.5}"), r"models\[1\].parameters.weight is missing for", "no default"),
        (yml("ties", "{weight: much}"), r"weight of models\[1\].parameters is 'much'", "number"),
        (yml("ties", "{weight: true}"), r"weight of models\[1\].parameters is True", "number"),
        (yml("ties", "{weight: .inf}"), r"weight of models\[1\].parameters is inf", "finite"),
        (yml("ties", "{weight: 1, density: 0}"), r"models\[1\].parameters.density is 0", "leave the model out"),
        (yml("ties", top="{normalize: 1}"), "normalize of parameters is 1", "true or false"),
        (yml("ties", top="{rescale: true}"), "parameters.rescale is not supported", "false"),
        (yml("breadcrumbs", top="{rescale: true}"), "parameters.rescale is not supported", "false"),
        (yml("della", "{weight: 1, density: 0.9}"), r"models\[1\].parameters.epsilon is 0.15", "between 0 and 1"),
        (yml("model_stock", "{}", "{}", "{filter_wise: true}"), "parameters.filter_wise is not", "remove"),
        (yml("sce", "{}", "{}", "{select_topk: 0}"), "parameters.select_topk is 0", "nothing"),
        (yml("slerp", "{}", "{}", "{t: 0.5}"), "models has 3 with the base", "one other model"),
        (yml("slerp", "{}", "{}", "{t: 0.5}").replace("- {model: b, parameters: {}}\n", "").replace("0.5", "2"),
         "parameters.t is 2", "between 0 and 1"),
        (yml("slerp", "{}", "{}").replace("- {model: b, parameters: {}}\n", ""),
         "parameters.t is missing", "no default"),
        (yml("ties").replace("base_model: base\n", ""), "base_model is missing", "start from"),
        (yml("ties", base="base+a"), "base_model has an adapter", "apply it first"),
        (yml("ties").replace("model: b,", "model: a+b,"), r"models\[2\].model applies an adapter to 'a'", "apply it"),
        (yml("ties") + "dtype: float64\n", "dtype is 'float64'", "float32"),
        (yml("ties") + "out_dtype: int64\n", "out_dtype is 'int64'", "float32"),
        ("merge_method: ties\nbase_model: base\nmodels: [{model: base}]\n", "models has the base alone", "an expert"),
        ("merge_method: ties\nbase_model: base\nparameters: {weight: 1}\nslices:\n- sources:\n"
         "  - {model: base, layer_range: [0, 3]}\n  - {model: a, layer_range: [0, 2]}\n",
         r"slices\[0\].sources\[1\].layer_range is \[0, 2\]", r"[0, 3]"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(read: Read, text: str, words: str, hint: str) -> None:
    with pytest.raises(RetexError, match=words) as caught:
        read(text)
    assert caught.value.message.startswith("theirs.yml: ")
    assert hint in str(caught.value.hint)
    assert caught.value.exit_status == 1


def test_weights_that_add_up_to_nothing_are_refused(read: Read) -> None:
    text = (
        "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1}}\n- {model: b, parameters: {weight: -1}}\n"
    )
    with pytest.raises(UsageError, match="add up to 0"):
        run(plan(read(text)))


def test_the_command_line_refuses_flags_beside_a_file(read: Read, retex: Callable[..., object]) -> None:
    read(yml("ties"))
    for flag in ("--method", "--base", "--density", "--weight", "--alpha", "--scope"):
        result = retex("merge", "--config", "theirs.yml", flag, "0.5")
        assert result.code == 2  # type: ignore[attr-defined]
        assert f"{flag} and --config cannot stand together" in result.err  # type: ignore[attr-defined]
    dry = retex("merge", "--config", "theirs.yml", "--dry-run")
    assert dry.code == 0, dry.err  # type: ignore[attr-defined]
    assert "read from theirs.yml" in dry.out  # type: ignore[attr-defined]
    made = retex("merge", "--config", "theirs.yml", "-o", "made", "--dtype", "float16")
    assert made.code == 0, made.err  # type: ignore[attr-defined]
    assert "theirs.yml: ties as mergekit computes it" in made.err  # type: ignore[attr-defined]
    assert load_file("made/model.safetensors")["norm.weight"].dtype == torch.float16
