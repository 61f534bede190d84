"""The published identifiers on worked examples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from identifiers import mass, nearest, prototypes, router, subspace
from identifiers.form import joined
from torch import nn


def clouds(n: int, seed: int, gap: float = 1.0, width: int = 20) -> dict[str, torch.Tensor]:
    """Two layers; only the last one tells three tasks apart."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, width, generator=torch.Generator().manual_seed(1)) * gap
    return {
        task: torch.randn(n, 2, width, generator=generator) + torch.stack([torch.zeros(width), centre])
        for task, centre in zip("abc", centres, strict=True)
    }


def accuracy(fit, n: int = 32) -> float:
    fitted = fit(clouds(n, 0))
    hits = [(fitted.scores(part).argmin(1) == t) for t, part in enumerate(clouds(200, 9).values())]
    return torch.cat(hits).double().mean().item()


def test_nearest_mean_worked() -> None:
    references = {"a": torch.tensor([[[2.0, 0.0]], [[0.0, 5.0]]]), "b": torch.tensor([[[0.0, -3.0]]])}
    fitted = nearest.nearest_mean(references)
    # the mean of (1, 0) and (0, 1) has length one at 45 degrees
    torch.testing.assert_close(fitted.scores(torch.tensor([[[9.0, 0.0]]])), torch.tensor([[1 - 0.5**0.5, 1.0]]))
    assert fitted.bytes == 2 * 2 * 4


def test_nearest_neighbour_worked() -> None:
    references = {"a": torch.tensor([[[2.0, 0.0]], [[0.0, 5.0]]]), "b": torch.tensor([[[0.0, -3.0]]])}
    fitted = nearest.nearest_neighbour(references)
    torch.testing.assert_close(fitted.scores(torch.tensor([[[0.0, 1.0]]])), torch.tensor([[0.0, 2.0]]))
    assert fitted.bytes == 3 * 2 * 4


def test_the_subspace_residual_against_its_definition() -> None:
    references, query = clouds(16, 0), clouds(4, 3)["b"]
    found = subspace.residual(references).scores(query)
    rows = query[:, -1].double().numpy()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for t, part in enumerate(references.values()):
        last = part[:, -1].double().numpy()
        last /= np.linalg.norm(last, axis=1, keepdims=True)
        basis = np.linalg.svd(last - last.mean(0))[2][:2]  # a tenth of 20 dimensions
        away = rows - last.mean(0)
        wanted = np.linalg.norm(away - away @ basis.T @ basis, axis=1)
        np.testing.assert_allclose(found[:, t].numpy(), wanted, atol=1e-5)


@pytest.mark.parametrize("fit", [nearest.nearest_mean, nearest.nearest_neighbour, subspace.residual])
def test_tasks_are_told_apart(fit) -> None:
    assert accuracy(fit) > 0.9


def test_the_router_learns_which_layer_tells() -> None:
    assert accuracy(lambda references: router.logistic(references, (0, 1))) > 0.9
    assert accuracy(lambda references: router.logistic(references, (0,))) < 0.5
    two = {task: part for task, part in clouds(32, 0).items() if task != "c"}
    scores = router.logistic(two, (1,)).scores(clouds(50, 2)["b"])
    assert (scores.argmin(1) == 1).double().mean() > 0.9


def test_router_scores_are_log_odds() -> None:
    """Differences of scores are those of scikit-learn's own decision function on the scaled rows."""
    from sklearn.linear_model import LogisticRegression

    references = clouds(32, 0)
    rows = np.concatenate([joined(part, (1,)).numpy() for part in references.values()])
    model = LogisticRegression(C=1.0, max_iter=1000, tol=1e-3)
    model.fit((rows - rows.mean(0)) / rows.std(0).mean(), np.repeat(range(3), 32))
    found = -router.logistic(references, (1,), (1.0,)).scores(references["a"])
    wanted = model.decision_function((rows[:32] - rows.mean(0)) / rows.std(0).mean())
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-3)


def test_the_router_takes_the_penalty_with_the_least_left_out_loss() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.model_selection import StratifiedKFold

    references, penalties = clouds(20, 0, gap=0.3), (1e-3, 3e-2, 1.0, 100.0)
    rows = np.concatenate([joined(part, (0, 1)).numpy() for part in references.values()])
    rows, owner = (rows - rows.mean(0)) / rows.std(0).mean(), np.repeat(range(3), 20)
    losses = dict.fromkeys(penalties, 0.0)
    for penalty in penalties:
        for train, held in StratifiedKFold(5, shuffle=True, random_state=0).split(rows, owner):
            model = LogisticRegression(C=penalty, max_iter=1000).fit(rows[train], owner[train])
            losses[penalty] += log_loss(owner[held], model.predict_proba(rows[held]))
    best = min(losses, key=losses.__getitem__)
    assert router.logistic(references, (0, 1), penalties).chosen == {"penalty": best}
    assert penalties[0] < best < penalties[-1]


def test_mass_finds_the_task_whose_weights_read_the_input() -> None:
    generator = torch.Generator().manual_seed(0)
    readers = {task: torch.linalg.qr(torch.randn(12, 4, generator=generator)).Q for task in ("a", "b", "c")}
    vectors = {task: {0: [torch.randn(8, 4, generator=generator) @ basis.T]} for task, basis in readers.items()}
    fitted = mass.residual(mass.subspaces(vectors))
    for t, basis in enumerate(readers.values()):
        inputs = torch.randn(50, 4, generator=generator) @ basis.T
        scores = fitted.scores(inputs[:, None])
        assert (scores.argmin(1) == t).all()
        assert scores[:, t].max() < 1e-3  # a third of 12 directions is all there is
    assert fitted.bytes == 3 * 4 * 12 * 4


def test_mass_takes_the_layer_that_names_the_references() -> None:
    generator = torch.Generator().manual_seed(0)
    readers = {task: torch.linalg.qr(torch.randn(12, 4, generator=generator)).Q for task in "abc"}
    noise = {task: torch.linalg.qr(torch.randn(12, 4, generator=generator)).Q for task in "abc"}
    bases = [{0: noise[task].T, 1: readers[task].T} for task in "abc"]
    references = {task: torch.randn(30, 4, generator=generator) @ readers[task].T for task in "abc"}
    fitted = mass.chosen_layer(bases, {task: rows[:, None].expand(-1, 2, -1) for task, rows in references.items()})
    assert fitted.chosen == {"layer": 1.0}
    assert fitted.bytes == 3 * 4 * 12 * 4, "the other layer is not stored"
    assert (fitted.scores(references["b"][:, None].expand(-1, 2, -1)).argmin(1) == 1).all()


@pytest.fixture
def layer() -> tuple[nn.Linear, list[torch.Tensor], prototypes.Adapter, torch.Tensor]:
    """A layer, two experts' residuals, their adapters at full rank, and inputs [2, positions, d_in] of the tasks."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(6, 5)
    residuals = [torch.randn(5, 6, generator=generator) for _ in range(2)]
    inputs = torch.randn(2, 7, 6, generator=generator) + torch.tensor([[[3.0]], [[-3.0]]])
    grams = [part.T @ part for part in inputs]
    found = prototypes.adapter(residuals, grams, list(inputs.mean(1)), 5)
    return linear, residuals, found, inputs


def test_a_routed_layer_is_the_experts_layer(layer) -> None:
    linear, residuals, found, inputs = layer
    module = nn.Sequential(linear)
    plain = module(inputs)
    with prototypes.routed(module, {"0": found}) as routing:
        adapted = module(inputs)
        assert routing.chosen["0"].tolist() == [0, 1]
        assert routing.votes(2).tolist() == [[1, 0], [0, 1]]
        routing.oracle = torch.tensor([1, 0])
        switched = module(inputs)
    wanted = torch.stack([part @ residual.T for part, residual in zip(inputs, residuals, strict=True)])
    torch.testing.assert_close(adapted - plain, wanted, atol=1e-4, rtol=1e-4)
    other = torch.stack([part @ residual.T for part, residual in zip(inputs, residuals[::-1], strict=True)])
    torch.testing.assert_close(switched - plain, other, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(module(inputs), plain)  # the hooks are gone


def test_masked_positions_have_no_vote(layer) -> None:
    linear, _, found, inputs = layer
    padded = torch.cat([inputs, -20 * inputs[:, :3]], 1)
    mask = torch.cat([torch.ones(2, 7), torch.zeros(2, 3)], 1)
    with prototypes.routed(nn.Sequential(linear), {"0": found}) as routing:
        routing.mask = mask
        nn.Sequential(linear)(padded)
        assert routing.chosen["0"].tolist() == [0, 1]
        routing.mask = None
        nn.Sequential(linear)(padded)
        assert routing.chosen["0"].tolist() == [1, 0]


def test_a_convolution_is_a_linear_layer_at_every_place(layer) -> None:
    linear, _, found, inputs = layer
    conv = nn.Conv2d(6, 5, 1)
    conv.weight.data = linear.weight.data[:, :, None, None]
    conv.bias.data = linear.bias.data
    with prototypes.routed(nn.Sequential(linear), {"0": found}):
        wanted = linear(inputs)
    images = inputs.transpose(1, 2)[..., None]
    with prototypes.routed(nn.Sequential(conv), {"0": found}):
        torch.testing.assert_close(conv(images)[..., 0].transpose(1, 2), wanted, atol=1e-4, rtol=1e-4)


def test_watching_hears_every_input(layer) -> None:
    linear, _, _, inputs = layer
    heard: list[tuple[str, torch.Tensor]] = []
    module = nn.Sequential(linear)
    with prototypes.watched(module, ["0"], lambda name, x: heard.append((name, x))):
        module(inputs)
    module(inputs)
    assert [name for name, _ in heard] == ["0"]
    assert torch.equal(heard[0][1], inputs)
