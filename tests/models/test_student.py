"""Networks that compute with given tensors do as the same networks filled with them, and pass gradients on."""

import copy

import torch
from torch import nn

from retex_cli.models.student import Student


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 4, 3)
        self.norm = nn.BatchNorm1d(4, eps=1e-2)
        self.out = nn.Linear(4, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        state = self.norm(self.conv(self.words(ids).transpose(1, 2))).relu()
        found: torch.Tensor = self.out(state.mean(2))
        return found


IDS = torch.arange(24).view(3, 8) % 11


def test_offsets_and_whole_tensors_do_as_filled_weights() -> None:
    torch.manual_seed(0)
    network = Net().eval()
    filled = copy.deepcopy(network)
    student = Student(network)
    assert student.adds("words.weight")
    assert student.adds("out.weight")
    assert not student.adds("conv.weight")
    before = network(IDS)
    given: dict[str, torch.Tensor | tuple[torch.Tensor, torch.Tensor]] = {
        "words.weight": (torch.randn(11, 2), torch.randn(2, 6)),
        "out.weight": (torch.randn(5, 1), torch.randn(1, 4)),
        "conv.weight": torch.randn(4, 6, 3),
        "norm.running_var": torch.rand(4) + 0.1,
        "norm.bias": torch.randn(4),
    }
    torch.testing.assert_close(before, filled(IDS))
    student.take(given)
    state = filled.state_dict()
    for name, value in given.items():
        state[name] = value if isinstance(value, torch.Tensor) else state[name] + value[0] @ value[1]
    filled.load_state_dict(state)
    torch.testing.assert_close(network(IDS), filled(IDS))
    assert (network(IDS) - before).abs().max() > 0.01


def test_gradients_reach_everything_that_is_given_and_nothing_else() -> None:
    torch.manual_seed(0)
    student = Student(Net().eval())
    left, right = torch.randn(11, 2, requires_grad=True), torch.randn(2, 6, requires_grad=True)
    mean, variance = torch.randn(4, requires_grad=True), torch.rand(4, requires_grad=True)
    student.take({"words.weight": (left, right), "norm.running_mean": mean, "norm.running_var": variance})
    student.module(IDS).square().sum().backward()
    for given in (left, right, mean, variance):
        assert given.grad is not None
        assert given.grad.norm() > 0
    assert all(parameter.grad is None for parameter in student.module.parameters())


def test_a_tied_weight_takes_its_whole_value() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
            self.out.weight = self.words.weight

    student = Student(Tied())
    assert not student.adds("words.weight")
    assert not student.adds("out.weight")
