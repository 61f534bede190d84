"""mergekit's YAML is read key by key: what is misspelt or foreign is refused with file, key and the next step."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from retex_cli.errors import RetexError
from retex_cli.io.mergekit_config import Condition, MergekitConfig, Reference, read_mergekit

GOOD = """
merge_method: ties
base_model: org/base@main
models:
  - model: org/cars
    parameters: {weight: 0.3, density: [0.1, 1e-1]}
  - model: {model: {path: org/dogs, revision: v2}, lora: adapters/dogs}
    parameters:
      weight:
        - {filter: mlp, value: 0.5}
        - {filter: "*", value: [1, 2]}
parameters: {normalize: true, lambda: 0.8}
dtype: bfloat16
out_dtype: float32
tokenizer_source: base
"""


def read(tmp_path: Path, text: str) -> MergekitConfig:
    file = tmp_path / "theirs.yml"
    file.write_text(text)
    return read_mergekit(file)


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    found = read(tmp_path, GOOD)
    assert found.sha256 == hashlib.sha256(GOOD.encode()).hexdigest()
    assert (found.method, found.base) == ("ties", Reference("org/base@main"))
    cars, dogs = found.inputs
    assert cars.reference == Reference("org/cars")
    assert cars.parameters["density"] == (Condition(None, (0.1, "1e-1")),), "YAML 1.1 reads 1e-1 as text"
    assert dogs.reference == Reference("org/dogs@v2", "adapters/dogs")
    assert dogs.parameters["weight"] == (Condition("mlp", (0.5,)), Condition(None, (1, 2)))
    assert found.scopes == {
        "parameters": {"normalize": (Condition(None, (True,)),), "lambda": (Condition(None, (0.8,)),)}
    }
    assert (found.dtype, found.out_dtype, found.tokenizer) == ("bfloat16", "float32", "tokenizer_source")


def test_one_slice_over_all_layers_is_read_as_models(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        "merge_method: slerp\nbase_model: a\nslices:\n- sources:\n  - {model: a, layer_range: [0, 4]}\n"
        "  - {model: b, layer_range: [0, 4]}\n  parameters: {t: 0.5}\n",
    )
    assert [entry.layers for entry in found.inputs] == [(0, 4), (0, 4)]
    assert list(found.scopes) == ["slices[0].parameters", "parameters"], "the nearer first"


def test_models_are_found_where_mergekit_looks_and_then_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a+b").mkdir()
    (tmp_path / "elsewhere" / "here").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = read(tmp_path, "merge_method: linear\nmodels: [{model: here}, {model: a+b}, {model: org/x+y}]\n")
    first, second, third = (entry.reference for entry in found.inputs)
    assert first == Reference("here")
    assert third == Reference("org/x", "y")
    assert second == Reference("a", "b"), "a plus sign means an adapter unless such a folder is here"


MODELS = "models: [{model: a}, {model: b}]\n"
TIES = "merge_method: ties\nbase_model: a\n"


@pytest.mark.parametrize(
    ("text", "words", "hint"),
    [
        ("- a\n", "the file is list, not a mapping", "known here"),
        ("a: [\n", "theirs.yml: while parsing", "one YAML document"),
        ("a: 1\n---\nb: 2\n", "expected a single document", "one YAML document"),
        (TIES + MODELS + "dtype: float32\ndtype: float16\n", "key 'dtype' is given twice", "one YAML"),
        (MODELS, "merge_method is missing", "name the method"),
        (TIES, "models is missing", "models"),
        (TIES + MODELS + "slices: [{sources: []}]\n", "models and slices cannot stand together", "models alone"),
        (TIES + "modules: {default: {models: []}}\n", "modules is not supported", "give models"),
        (TIES + MODELS + "chat_template: chatml\n", "chat_template is not applied", "base's chat template"),
        (TIES + MODELS + "mergemethod: x\n", "mergemethod is not a key", "merge_method"),
        (TIES + "models: [{modell: a}]\n", r"models\[0\].modell is not a key", "model"),
        (TIES + "models: [{parameters: {}}]\n", r"models\[0\].model is missing", "hub id"),
        (TIES + "models: [{model: 3}]\n", r"models\[0\].model is 3", "hub id"),
        (TIES + "models: [{model: a}, {model: a}]\n", r"models\[1\] is the model of models\[0\] again", "once"),
        (TIES + "models: {a: b}\n", "models is {'a': 'b'}", "a list"),
        (TIES + "models: [{model: a, parameters: 3}]\n", "parameters is 3", "mapping"),
        (TIES + "models: [{model: a, parameters: {weight: []}}]\n", "weight is", "list of values"),
        (TIES + "models: [{model: a, parameters: {weight: [{value: 1}, 2]}}]\n", "weight is", "list of values"),
        (TIES + "models: [{model: a, parameters: {weight: [{filter: x}]}}]\n", "value is missing", "give a value"),
        (TIES + "models: [{model: a, parameters: {weight: [{filtr: x, value: 1}]}}]\n", "filtr", "filter"),
        (TIES + "models: [{model: a, parameters: {weight: {filter: 3, value: 1}}}]\n", "filter is 3", "name"),
        (TIES + "models: [{model: {model: a, override_architecture: X}}]\n", "override_architecture", "remove"),
        (TIES + MODELS + "tokenizer_source: union\n", "tokenizer_source 'union' is not", "use base"),
        (TIES + MODELS + "tokenizer_source: b\n", "tokenizer_source 'b' is not", "use base"),
        (TIES + MODELS + "tokenizer: {}\n", "tokenizer.source 'union' is not", "use base"),
        (TIES + MODELS + "tokenizer: {source: base, tokens: {x: {source: a}}}\n", "tokenizer.tokens", "remove"),
        (TIES + MODELS + "tokenizer: {source: base, pad_to_multiple_of: 8}\n", "pad_to_multiple_of", "remove"),
        (TIES + MODELS + "dtype: 16\n", "dtype is 16", "a name"),
        (TIES + "slices: [{sources: []}]\n", "sources is", "an entry or more"),
        (TIES + "slices: [{sources: [{model: a}]}]\n", "layer_range is None", "number of layers"),
        (TIES + "slices: [{sources: [{model: a, layer_range: [0, 1]}], residual_weight: 1}]\n", "residual", "remove"),
        (TIES + "slices: [{sources: [{model: b, layer_range: [0, 1]}], base_model: b}]\n", "base_model is not", "top"),
        (TIES + "slices: [{sources: [1]}, {sources: [1]}]\n", "slices has 2 entries", "one slice"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, text: str, words: str, hint: str) -> None:
    with pytest.raises(RetexError, match=words) as caught:
        read(tmp_path, text)
    assert "theirs.yml" in caught.value.message
    assert hint in str(caught.value.hint)
    assert caught.value.exit_status == 1


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RetexError, match=r"none\.yml: No such file"):
        read_mergekit(tmp_path / "none.yml")


def test_a_merge_key_may_repeat_what_it_brings(tmp_path: Path) -> None:
    text = TIES + "models:\n- &one {model: a, parameters: {weight: 1}}\n- {<<: *one, model: b}\n"
    assert [entry.reference.model for entry in read(tmp_path, text).inputs] == ["a", "b"]
