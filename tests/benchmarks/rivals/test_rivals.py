"""Every rival: what is evaluated comes out of its bytes alone, and the bytes are as many as its paper says."""

from __future__ import annotations

import itertools

import pytest
import torch
from rivals.form import Case, Files, Form, Known
from rivals.table import forms

TASKS = ("cars", "dtd", "eurosat", "gtsrb")
SHAPES = {
    "embeddings.weight": (200, 48),
    "layer.0.query.weight": (48, 48),
    "layer.0.intermediate.dense.weight": (96, 48),
    "layer.0.output.dense.weight": (48, 96),
    "stem.weight": (16, 3, 3, 3),
    "norm.weight": (48,),
    "scale": (),
}
LAYERS = ("layer.0.query.weight", "layer.0.intermediate.dense.weight", "layer.0.output.dense.weight")
NUMEL = sum(torch.Size(shape).numel() for shape in SHAPES.values())
FORMS = forms(len(TASKS))


def draw(seed: int, scale: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def make_case() -> Case:
    base = draw(0, 0.1)
    taus = {task: draw(seed, 0.01) for seed, task in enumerate(TASKS, 1)}
    experts = {task: {name: base[name] + tau[name] for name in SHAPES} for task, tau in taus.items()}
    merged = {name: torch.stack([expert[name] for expert in experts.values()]).mean(0) for name in SHAPES}
    inputs = {name: torch.randn(40, SHAPES[name][1], generator=torch.Generator().manual_seed(9)) for name in LAYERS}
    grams = {task: {name: x.T @ x for name, x in inputs.items()} for task in TASKS}
    return Case(Known(merged, base), experts, lambda: grams)


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case()


def error(case: Case, form: Form, files: Files) -> float:
    """Squared error over all tasks as a share of the offsets' own energy."""
    left = whole = 0.0
    for task, expert in case.experts.items():
        found = form.decode(case.known, files, task)
        for name, tensor in expert.items():
            left += float((found[name] - tensor).square().sum())
            whole += float((case.known.merged[name] - tensor).square().sum())
    return left / whole


def label(form: Form) -> str:
    return f"{form.name} {form.size}"


@pytest.mark.parametrize("form", FORMS, ids=label)
def test_what_is_evaluated_comes_from_the_bytes(case: Case, form: Form) -> None:
    files = form.encode(case)
    assert set(files.tasks) == set(TASKS)
    again = Files({task: bytes(bytearray(data)) for task, data in files.tasks.items()}, bytes(bytearray(files.shared)))
    before = {name: tensor.clone() for name, tensor in case.known.merged.items()}
    for task in TASKS:
        found = form.decode(case.known, again, task)
        assert list(found) == list(SHAPES)
        for name, shape in SHAPES.items():
            assert found[name].shape == shape, name
            assert found[name].dtype == torch.float32
            assert bool(found[name].isfinite().all())
    assert all(torch.equal(before[name], tensor) for name, tensor in case.known.merged.items()), "inputs stay as given"
    assert form.encode(case) == files, "the same experts give the same bytes"


@pytest.mark.parametrize("form", FORMS, ids=label)
def test_another_file_gives_another_expert(case: Case, form: Form) -> None:
    files = form.encode(case)
    first, second = (form.decode(case.known, files, task) for task in TASKS[:2])
    assert any(not torch.equal(first[name], second[name]) for name in SHAPES)


GROWING = {"svd", "lora-extract", "esm++", "esm++-everywhere"}


def test_more_bytes_bring_more_of_an_expert_back(case: Case) -> None:
    for name in GROWING:
        sizes = [form for form in FORMS if form.name == name]
        files = [form.encode(case) for form in sizes]
        bytes_ = [form.bytes_per_task(found) for form, found in zip(sizes, files, strict=True)]
        errors = [error(case, form, found) for form, found in zip(sizes, files, strict=True)]
        assert len(sizes) > 2
        assert all(a < b for a, b in itertools.pairwise(bytes_)), name
        assert all(a > b for a, b in itertools.pairwise(errors)), name
        assert errors[0] < 1, "a little is better than nothing"


def test_bytes_are_those_of_the_files() -> None:
    form = FORMS[0]
    assert form.bytes_per_task(Files({"cars": bytes(10), "dtd": bytes(20)}, bytes(8))) == 19
    emr = next(form for form in FORMS if form.name == "emr")
    assert emr.bytes_per_task(Files({"cars": bytes(10), "dtd": bytes(20)}, bytes(8))) == 15
