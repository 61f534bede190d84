"""Experts of low rank: the merge from their factors is that of the whole task vectors, which are never made."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from retex_cli.errors import RetexError
from retex_cli.merging.engine import Merge, stream
from retex_cli.merging.memory import Held, merge_tensors
from retex_cli.merging.options import Value
from retex_cli.merging.table import find_method
from retex_cli.merging.view import View

METHODS = ("tsv_m", "iso_c", "knots")


@dataclass(frozen=True)
class Adapter:
    """A source that knows its factors and cannot be read."""

    left: Tensor
    right: Tensor
    where: str = "adapter.safetensors: tensor 'w'"

    def read_into(self, start: int, out: Tensor) -> None:
        raise AssertionError("the whole product was asked for")

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.left, self.right


class Sink(list[Tensor]):
    def write(self, data: Tensor) -> None:
        self.append(data)


def adapters(shape: tuple[int, int], ranks: tuple[int, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(4)
    return {
        f"task{t}": (torch.randn(shape[0], r, generator=draw), torch.randn(r, shape[1], generator=draw))
        for t, r in enumerate(ranks)
    }


def merge(method: str, base: Tensor, experts: dict[str, tuple[Tensor, Tensor]], **options: Value) -> Tensor:
    sources = tuple(Adapter(*pair) for pair in experts.values())
    view = View("w", tuple(base.shape), tuple(experts), Held("base", base), sources)
    row, sink = find_method(method), Sink()
    stream(row, [Merge(view, row.resolve(options), torch.float32)], sink, threads=1)
    return torch.cat(list(sink)).view(base.shape)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (300, 20)])
@pytest.mark.parametrize(
    ("method", "ranks"),
    [*((method, (2, 4, 3)) for method in METHODS), ("tsv_m", (12, 15, 14)), ("knots", (12, 15, 14))],
)
def test_factors_give_the_merge_of_whole_task_vectors(
    method: str, shape: tuple[int, int], ranks: tuple[int, ...]
) -> None:
    base, experts = torch.zeros(shape), adapters(shape, ranks)
    dense = merge_tensors(method, {"w": base}, {t: {"w": b @ a} for t, (b, a) in experts.items()})["w"]
    found = merge(method, base, experts)
    assert (found - dense).norm() < 1e-5 * dense.norm()
    assert dense.norm() > 0


def test_esm_without_statistics_takes_factors_as_well() -> None:
    base, experts = torch.zeros(60, 40), adapters((60, 40), (2, 14, 3))
    taus = {t: {"w": b @ a} for t, (b, a) in experts.items()}
    dense = merge_tensors("esm", {"w": base}, taus, {"variant": "roberta"})["w"]
    found = merge("esm", base, experts, variant="roberta")
    assert 0 < (found - dense).norm() < 1e-5 * dense.norm() < dense.norm() < merge("tsv_m", base, experts).norm()


@pytest.mark.parametrize("method", METHODS)
def test_the_base_is_added_and_rows_beyond_it_are_the_task_s(method: str) -> None:
    experts = adapters((50, 40), (3, 3))
    grown = {task: (torch.cat([left, torch.ones(5, 3)]), right) for task, (left, right) in experts.items()}
    base = torch.randn(50, 40, generator=torch.Generator().manual_seed(8))
    assert torch.equal(merge(method, base, grown), merge(method, base, experts))
    plain = merge(method, torch.zeros(50, 40), experts)
    torch.testing.assert_close(merge(method, base, experts) - base, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_that_changes_nothing_leaves_the_base(method: str) -> None:
    base = torch.ones(30, 20)
    experts = {task: (left * 0, right) for task, (left, right) in adapters((30, 20), (2, 2)).items()}
    assert torch.equal(merge(method, base, experts), base)
    with pytest.raises(AssertionError, match="whole product"):
        merge("task_arithmetic", base, experts)


def test_a_factor_that_is_not_finite_is_named() -> None:
    experts = adapters((30, 20), (2, 2))
    experts["task1"][0][3, 1] = float("nan")
    with pytest.raises(RetexError, match=r"adapter.safetensors: tensor 'w', one of its factors, holds nan"):
        merge("knots", torch.zeros(30, 20), experts)
