"""What the example suites do before they train: reading, splitting, writing, naming experts by their recipes."""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from retex_cli.io.inputs import read_rows
from retex_cli.models.encoder import feature_layers

SUITES = Path(__file__).parent.parent / "examples" / "suites"


@pytest.fixture(scope="module")
def suites() -> Iterator[SimpleNamespace]:
    """The modules of examples/suites, which import each other as scripts do."""
    before = set(sys.modules)
    sys.path.insert(0, str(SUITES))
    try:
        import data
        import finetune
        import lite0
        import restoration
        import restorer
        import text
        import text_tasks
        import vision
        import vision_tasks

        yield SimpleNamespace(
            data=data,
            finetune=finetune,
            lite0=lite0,
            restoration=restoration,
            restorer=restorer,
            text=text,
            text_tasks=text_tasks,
            vision=vision,
            vision_tasks=vision_tasks,
        )
    finally:
        sys.path.remove(str(SUITES))
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", None)).startswith(str(SUITES)):
                del sys.modules[name]


def test_the_recipes_of_the_text_experts_keep_their_places_in_the_cache(suites, monkeypatch) -> None:
    monkeypatch.setenv("RETEX_CACHE", "/cache")
    assert suites.text.recipe("sms_spam", 0, 200).folder == Path("/cache/experts/sms_spam-17159a9fbe09")
    assert suites.text.recipe("reuters52", 0, 600).folder == Path("/cache/experts/reuters52-44dd07afc61a")
    assert suites.text.recipe("sms_spam", 1, 200).folder != suites.text.recipe("sms_spam", 0, 200).folder


def test_every_part_of_a_recipe_moves_the_expert(suites) -> None:
    recipes = [suites.vision.recipe(*given) for given in (("a", 0, 9), ("b", 0, 9), ("a", 1, 9), ("a", 0, 8))]
    assert len({recipe.folder for recipe in recipes}) == 4


def test_text_rows_are_split_by_their_words_and_never_shared_with_the_test(suites) -> None:
    rows = [(f"number {i // 2}", "odd" if i % 2 else "even") for i in range(2000)]
    split = suites.text_tasks._hashed_split(iter(rows))
    train, test = ({text for text, _ in side} for side in (split.train, split.test))
    assert len(train) + len(test) == 1000, "a text that comes twice is taken once"
    assert not train & test
    assert 150 < len(test) < 250
    references = {text for text, _ in split.train[: suites.data.REFERENCES]}
    validation = {text for text, _ in split.validation}
    assert len(validation) == suites.data.VALIDATIONS
    assert validation <= train - references


def test_images_are_split_by_their_pixels_into_three_parts(suites) -> None:
    draw = np.random.default_rng(0)
    rows = [(draw.integers(0, 256, (4, 5), dtype=np.uint8), str(i)) for i in range(30)]
    cut, ordered = suites.vision_tasks.cut, suites.vision_tasks.ordered
    split = cut(ordered(iter(rows)), tests=9, validations=5)
    assert [len(part) for part in (split.train, split.validation, split.test)] == [16, 5, 9]
    assert sorted(int(label) for part in (split.train, split.validation, split.test) for _, label in part) == [
        *range(30)
    ]
    again = cut(ordered(reversed(rows)), tests=9, validations=5)
    assert [label for _, label in again.test] == [label for _, label in split.test], "the file's order does not matter"


def test_prepared_images_are_small_square_and_in_three_channels(suites) -> None:
    size = suites.vision_tasks.SIZE
    grey = suites.vision_tasks.prepared(np.full((7, 9), 130, np.uint8))
    assert (grey.shape, grey.dtype) == ((3, size, size), torch.uint8)
    assert grey.unique().tolist() == [130]
    colour = np.zeros((10, 10, 3), np.uint8)
    colour[:, 5:, 1] = 200
    found = suites.vision_tasks.prepared(colour)
    assert (found[1, 0, 0], found[1, 0, -1], found[0].max()) == (0, 200, 0)


def test_cells_keep_what_brightness_alone_would_wash_away(suites) -> None:
    size = suites.vision_tasks.SIZE
    image = np.full((4 * size, 4 * size), 100, np.uint8)
    image[1, 0:3:2], image[1, 1] = 132, 68
    found = suites.vision_tasks.cells(image)
    assert (found.shape, found.dtype) == ((size, size, 3), np.uint8)
    assert found[0, 0].tolist() == [102, 20, 24]  # (32 + 32 - 32) / 16, 2 (64 + 64 + 32) / 16, 2 (6 x 32) / 16
    assert found[1, 1].tolist() == [100, 0, 0]


def test_strokes_follow_the_pen(suites) -> None:
    flat = [0, 50, 100, 50] * 4
    up = [0, 0, 0, 100] * 4
    across, upright = suites.vision_tasks.strokes(np.array([flat, up]))
    assert across.dtype == np.uint8
    assert across[13:15, 4:24].min() > 200
    assert across[:11].max() == 0
    assert upright[4:24, 2].min() > 200
    assert upright[:, 5:].max() == 0


def test_only_arrays_are_unpickled(suites) -> None:
    array = np.arange(6).reshape(2, 3)
    unpickler = suites.vision_tasks.ArraysOnly
    assert np.array_equal(unpickler(io.BytesIO(pickle.dumps(array))).load(), array)
    with pytest.raises(pickle.UnpicklingError, match="is no array"):
        unpickler(io.BytesIO(pickle.dumps(Path))).load()


def test_what_the_suites_write_retex_reads(suites, tmp_path: Path) -> None:
    images = [(torch.full((3, 2, 2), i, dtype=torch.uint8), "ab"[i % 2]) for i in range(4)]
    suites.vision.write(tmp_path / "x.safetensors", images, ["a", "b"])
    suites.vision.write(tmp_path / "u.safetensors", images, None)
    assert [row.label for row in read_rows(tmp_path / "x.safetensors")] == ["a", "b", "a", "b"]
    found = read_rows(tmp_path / "u.safetensors")
    assert {row.label for row in found} == {None}
    assert found[3].tensors["pixel_values"].unique().tolist() == [3]
    suites.text.write(tmp_path / "x.jsonl", [("good", "yes"), ("bad", "no")], ["no", "yes"])
    suites.text.write(tmp_path / "u.jsonl", [("good", "yes")], None)
    assert [(row.text, row.label) for row in read_rows(tmp_path / "x.jsonl")] == [("good", "yes"), ("bad", "no")]
    assert [(row.text, row.label) for row in read_rows(tmp_path / "u.jsonl")] == [("good", None)]


def test_the_vision_network(suites) -> None:
    torch.manual_seed(0)
    network = suites.lite0.build({"id2label": {"0": "a", "1": "b"}}).eval()
    assert len(feature_layers(network)) == 16
    images = torch.randint(0, 256, (2, 3, 33, 48), dtype=torch.uint8)
    with torch.inference_mode():
        logits = network(images)
        torch.testing.assert_close(network(images.float()), logits)
        assert logits.shape == (2, 2)
        assert suites.lite0.build({}).eval()(images).shape == (2, 1280)
    body = sum(p.numel() for name, p in network.named_parameters() if not name.startswith("_fc."))
    assert body == 3_371_008


@pytest.mark.parametrize(("size", "kernel", "stride"), [(8, 3, 2), (7, 3, 2), (8, 5, 2), (9, 5, 1)])
def test_convolutions_pad_as_tensorflow_does(suites, size: int, kernel: int, stride: int) -> None:
    conv = suites.lite0.SameConv(1, 1, kernel, stride)
    conv.weight.data.fill_(1.0)
    out = -(-size // stride)
    short = max((out - 1) * stride + kernel - size, 0)
    padded = torch.zeros(1, 1, size + short, size + short)
    padded[..., short // 2 : short // 2 + size, short // 2 : short // 2 + size] = 1
    expected = padded.unfold(2, kernel, stride).unfold(3, kernel, stride).sum((-1, -2))
    assert conv(torch.ones(1, 1, size, size)).shape[2:] == (out, out)
    torch.testing.assert_close(conv(torch.ones(1, 1, size, size)), expected)


def test_the_restorer_begins_as_the_identity(suites) -> None:
    network = suites.restorer.build({})
    images = torch.rand(2, 3, 9, 12)
    with torch.inference_mode():
        torch.testing.assert_close(network(images), images)
        network.layers[0].weight.zero_()
        network.layers[-1].bias.fill_(0.5)
        torch.testing.assert_close(network(images), images + 0.5)
    assert not [part for part in network.modules() if "Norm" in type(part).__name__]


def test_photographs_for_tests_are_none_that_experts_saw(suites) -> None:
    seen, kept = (suites.restoration.photographs(test) for test in (False, True))
    assert [image.shape[0] for image in seen + kept] == [3] * 4
    assert [a.shape[2] + b.shape[2] for a, b in zip(seen, kept, strict=True)] == [640, 640]
    assert all(0 <= float(image.min()) < float(image.max()) <= 1 for image in seen + kept)


def test_every_degradation_takes_something_away(suites) -> None:
    draw = torch.Generator().manual_seed(0)
    clean = suites.restoration.patches(suites.restoration.photographs(True), 4, draw)
    assert clean.shape == (4, 3, suites.restoration.SIZE, suites.restoration.SIZE)
    found = {task: degrade(clean, draw) for task, degrade in suites.restoration.TASKS.items()}
    assert {image.shape for image in found.values()} == {clean.shape}
    assert all(float((image - clean).square().mean()) > 1e-4 for image in found.values())
    assert float((found["holes"] == 0).all(1).float().mean()) == pytest.approx(0.4, abs=0.05)
    blocks = found["pixels"].unfold(2, 3, 3).unfold(3, 3, 3)
    assert torch.equal(blocks, blocks[..., :1, :1].expand_as(blocks))


@pytest.mark.slow
def test_the_restoration_family_is_made_and_kept(suites, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RETEX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(suites.restoration, "BASE", suites.restoration.Recipe("base", steps=3))
    suites.restoration.make(tmp_path / "space", steps=2)
    folders = sorted((tmp_path / "cache/experts").iterdir())
    assert len(folders) == 1 + len(suites.restoration.TASKS)
    before = [(folder / "model.safetensors").stat().st_mtime_ns for folder in folders]
    suites.restoration.make(tmp_path / "space", steps=2)
    assert [(folder / "model.safetensors").stat().st_mtime_ns for folder in folders] == before
    monkeypatch.chdir(tmp_path)
    assert len(read_rows(Path("space/data/blur-inputs.safetensors"))) == suites.data.REFERENCES
