"""EMR, TALL masks and BitDelta."""

from __future__ import annotations

import pytest
import torch
from rivals import masks, signs
from rivals.form import Case, Known

BASE = {"w": torch.tensor([[1.0, 1.0, 1.0, 1.0]])}


def case_of(**taus: list[float]) -> Case:
    experts = {task: {"w": BASE["w"] + torch.tensor([tau])} for task, tau in taus.items()}
    return Case(Known(BASE, BASE), experts, dict)


def test_emr_by_hand() -> None:
    case = case_of(a=[2.0, -1.0, 0.5, 1.0], b=[1.0, 3.0, 0.25, -1.0])
    files = masks.emr(case)
    # elected: 2, 3, 0.5, nothing (the signs cancel); a agrees in the first and third, b in the first three
    a, b = (masks.decode(case.known, files, task)["w"][0] - 1 for task in ("a", "b"))
    torch.testing.assert_close(a, torch.tensor([2.0, 0.0, 0.5, 0.0]) * (4.5 / 2.5))
    torch.testing.assert_close(b, torch.tensor([2.0, 3.0, 0.5, 0.0]) * (5.25 / 5.5))


def test_tall_by_hand() -> None:
    case = case_of(a=[2.0, -1.0, 0.5, 0.0], b=[1.0, 3.0, 0.25, 2.0])
    files = masks.tall(case, 0.5)
    a, b = (masks.decode(case.known, files, task)["w"][0] - 1 for task in ("a", "b"))
    torch.testing.assert_close(a, torch.tensor([3.0, 0.0, 0.75, 0.0]))
    torch.testing.assert_close(b, torch.tensor([3.0, 2.0, 0.75, 2.0]))


def test_a_single_expert_is_exact() -> None:
    case = case_of(a=[2.0, -1.0, 0.5, 1.0])
    for files in (masks.emr(case), masks.tall(case, 0.4)):
        torch.testing.assert_close(masks.decode(case.known, files, "a")["w"], case.experts["a"]["w"])


@pytest.mark.parametrize("form", ["emr", "tall", "bitdelta"])
def test_a_task_costs_at_most_a_bit_a_parameter(form: str) -> None:
    numel = 200 * 300
    base = {"w": torch.zeros(200, 300)}
    generator = torch.Generator().manual_seed(0)
    experts = {task: {"w": torch.randn(200, 300, generator=generator)} for task in "abcd"}
    case = Case(Known(base, base), experts, dict)
    if form == "bitdelta":
        size = len(signs.encode(base, experts["a"]))
    else:
        files = masks.emr(case) if form == "emr" else masks.tall(case, 0.4)
        size = len(files.tasks["a"])
        assert len(files.shared) == 8 + 2 * numel
    assert numel / 16 < size < numel / 8 + 64


def test_bitdelta_by_hand() -> None:
    merged = {"w": torch.zeros(2, 2), "bias": torch.zeros(2)}
    expert = {"w": torch.tensor([[1.0, -2.0], [3.0, -4.0]]), "bias": torch.tensor([0.5, -0.25])}
    found = signs.decode(merged, signs.encode(merged, expert))
    assert found["w"].tolist() == [[2.5, -2.5], [2.5, -2.5]]
    assert torch.equal(found["bias"], expert["bias"])
