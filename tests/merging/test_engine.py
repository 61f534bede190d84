"""The engine: the same bits however work is cut and shared, nothing lost, nothing silent."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from retex_cli.errors import RetexError
from retex_cli.merging import pieces, view
from retex_cli.merging.engine import Copy, Merge, stream
from retex_cli.merging.memory import Held, merge_tensors
from retex_cli.merging.table import METHODS, find_method
from retex_cli.merging.view import View, spans

ANY_NUMBER = [name for name, method in METHODS.items() if method.needs == "nothing"]


@pytest.mark.parametrize("method", ANY_NUMBER)
def test_bits_do_not_depend_on_threads_or_blocks(
    method: str, make_models: Callable[..., tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = make_models(tasks=3)
    base["long"] = torch.linspace(-1, 1, 30_001)
    for task in experts.values():
        task["long"] = base["long"] + 0.1 * torch.randn(30_001, generator=torch.Generator().manual_seed(7))
    whole = merge_tensors(method, base, experts, threads=1)
    monkeypatch.setattr(view, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(pieces, "GROUP_ELEMENTS", 4096)
    cut = merge_tensors(method, base, experts, threads=3)
    assert all(torch.equal(whole[name], cut[name]) for name in base)


@pytest.mark.parametrize("method", ANY_NUMBER)
def test_the_order_of_experts_and_tensors_does_not_matter(method: str, make_models: Callable[..., tuple]) -> None:
    base, experts = make_models(tasks=3)
    forward = merge_tensors(method, base, experts)
    backward = merge_tensors(method, dict(reversed(base.items())), dict(reversed(experts.items())))
    assert all(torch.equal(forward[name], backward[name]) for name in base)


@pytest.mark.parametrize("method", ANY_NUMBER)
def test_experts_equal_to_the_base_give_the_base(method: str, make_models: Callable[..., tuple]) -> None:
    base, _ = make_models()
    merged = merge_tensors(method, base, {"a": base, "b": base})
    for name, weights in base.items():
        torch.testing.assert_close(merged[name], weights, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["base", "a"])
def test_a_value_that_is_not_finite_is_named_with_its_place(value: float, where: str) -> None:
    base, experts = {"w": torch.ones(9000)}, {"a": {"w": torch.ones(9000)}, "b": {"w": torch.ones(9000)}}
    {"base": base, **experts}[where]["w"][8123] = value
    for method in ("average", "ties"):
        with pytest.raises(RetexError, match=rf"tensor 'w' of .*{where}.* holds -?(nan|inf) at element 8123"):
            merge_tensors(method, base, experts)


def test_large_finite_weights_whose_sum_overflows_are_no_error() -> None:
    big = torch.full((100,), 3e38)
    merged = merge_tensors("ties", {"w": big}, {"a": {"w": big}})
    assert torch.equal(merged["w"], big)


def test_a_result_beyond_the_output_type_is_refused() -> None:
    step = Merge(
        View("w", (2,), ("a",), Held("base", torch.zeros(2)), (Held("a", torch.tensor([1.0, 70000.0])),)),
        {},
        torch.float16,
    )
    with pytest.raises(RetexError, match="tensor 'w' does not fit float16"):
        stream(find_method("average"), [step], _List())


class _List:
    def __init__(self) -> None:
        self.blocks: list[torch.Tensor] = []

    def write(self, data: torch.Tensor) -> None:
        self.blocks.append(data)


def test_copies_keep_their_type_and_their_place_in_the_order() -> None:
    counts = torch.arange(5)
    sink = _List()
    done: list[int] = []
    copy = Copy(Held("ids", counts), 5, torch.int64)
    merge = Merge(View("w", (2,), ("a",), Held("base", torch.zeros(2)), (Held("a", torch.ones(2)),)), {}, torch.float32)
    stream(find_method("average"), [copy, merge, copy], sink, threads=2, budget=1, advance=done.append)
    assert [block.tolist() for block in sink.blocks] == [[0, 1, 2, 3, 4], [1.0, 1.0], [0, 1, 2, 3, 4]]
    assert done == [1, 1, 1]


@pytest.mark.parametrize(
    ("method", "options", "stages"),
    [
        ("average", {}, ["merging 3"]),
        ("ties", {"scope": "tensor"}, ["merging 3"]),
        ("ties", {}, ["first pass 1", "merging 3"]),
        ("doge", {"steps": 1}, ["first pass 1", "merging 3"]),
        ("average", {"lines": 1}, ["first pass 3", "merging 3"]),
    ],
)
def test_passes_over_the_whole_model_are_announced_and_followed(
    method: str, options: dict[str, object], stages: list[str]
) -> None:
    base = {f"layer.{i}.weight": torch.ones(4, 3) for i in range(3)}
    views = [
        View(name, (4, 3), ("a",), Held("base", weights), (Held("a", 2 * weights),)) for name, weights in base.items()
    ]
    row, seen = find_method(method), []
    left: list[int] = []

    def begin(label: str, total: int) -> None:
        assert sum(left) == 0, "the stage before is finished"
        seen.append(f"{label} {total}")
        left.append(total)

    steps = [Merge(view, row.resolve(options), torch.float32) for view in views]
    stream(row, steps, _List(), threads=2, begin=begin, advance=lambda done: left.append(-done))
    assert seen == stages
    assert sum(left) == 0


def test_the_first_error_stops_everything_and_gives_torch_its_threads_back() -> None:
    before = torch.get_num_threads()
    base = {str(i): torch.ones(10) for i in range(50)}
    with pytest.raises(RetexError):
        merge_tensors("average", base, {"a": {**base, "25": torch.full((10,), float("nan"))}}, threads=2)
    assert torch.get_num_threads() == before


def test_spans_cover_every_element_once() -> None:
    views = [View(str(n), (n,), (), Held("", torch.empty(0)), ()) for n in (10, 0, 5000, 3, 9000, 1)]
    pieces = [piece for group in spans(views, 4096) for piece in group]
    for one in views:
        assert sum(stop - first for owner, first, stop in pieces if owner is one) == one.numel
    assert all(sum(stop - first for _, first, stop in group) <= 4096 for group in spans(views, 4096))


@pytest.mark.parametrize("method", ANY_NUMBER)
def test_what_a_batch_norm_measured_is_averaged_by_every_method(method: str) -> None:
    """A variance is no weight: task arithmetic would make it negative here."""
    name = "bn.running_var"
    base, experts = {name: torch.ones(4), "w": torch.zeros(4)}, {}
    for task, variance in (("a", 0.1), ("b", 0.3)):
        experts[task] = {name: torch.full((4,), variance), "w": torch.ones(4)}
    merged = merge_tensors(method, base, experts, {"lines": 1})
    torch.testing.assert_close(merged[name], torch.full((4,), 0.2))
