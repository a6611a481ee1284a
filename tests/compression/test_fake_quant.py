import pytest
import torch
from torch import nn

from limbeck.compression.fake_quant import FakeQuant
from limbeck.compression.weights import chosen_weights, run_with


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mode", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [None, "tensor", 4, 5, 100])
@pytest.mark.parametrize("shape", [(6, 10), (3, 2, 3, 3), (7,)])
def test_zeros_stay_zero_and_errors_are_bounded(mode, group, shape):
    weights = draw(*shape) + 0.5
    weights[weights < 0.2] = 0.0
    made = FakeQuant(4, group, mode)
    out, parts = made(weights), made.quantize(weights)
    assert out.shape == weights.shape
    assert (out[weights == 0] == 0).all()
    steps = 0.5 if mode == "symmetric" else 1.0
    assert (out - weights).abs().max() <= steps * parts.scale.max() * (1 + 1e-5)
    assert parts.codes.unique().numel() <= 16


def test_against_a_loop():
    weights = draw(3, 7)
    out = FakeQuant(3, 4)(weights)
    for row in range(3):
        for start in (0, 4):
            part = weights[row, start : start + 4].tolist()
            scale = max(map(abs, part)) / 3
            expected = [round(value / scale) * scale for value in part]
            torch.testing.assert_close(out[row, start : start + 4], torch.tensor(expected))


def test_one_scale_an_output_and_one_in_all():
    weights = torch.tensor([[1.0, -0.4], [100.0, 3.0]])
    assert FakeQuant(2)(weights).tolist() == [[1.0, 0.0], [100.0, 0.0]]
    assert FakeQuant(2, "tensor")(weights).tolist() == [[0.0, 0.0], [100.0, 0.0]]


def test_the_gradient_passes_straight_through():
    weights = draw(4, 6).requires_grad_()
    FakeQuant(3, 4, "asymmetric")(weights).backward(gradient := draw(4, 6, seed=1))
    assert torch.equal(weights.grad, gradient)


@pytest.mark.parametrize(
    ("bits", "group", "mode"), [(1, None, "symmetric"), (17, None, "asymmetric"), (4, 0, "symmetric")]
)
def test_what_cannot_be_is_refused(bits, group, mode):
    with pytest.raises(ValueError, match=r"bits are out of range|at least one"):
        FakeQuant(bits, group, mode)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.middle = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.norm(self.first(x))))


def test_layers_and_norms_can_be_left_out():
    model = Tied()
    assert list(chosen_weights(model)) == [
        *("first.weight", "first.bias", "norm.weight", "norm.bias", "middle.weight", "middle.bias")
    ]
    assert list(chosen_weights(model, matrices_only=True)) == ["first.weight", "middle.weight"]
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    assert list(chosen_weights(network, first_and_last=False)) == ["1.weight", "1.bias"]


def test_a_model_runs_with_other_weights_and_is_itself_again():
    model, inputs = Tied(), draw(5, 4)
    before = {name: value.clone() for name, value in model.named_parameters()}
    halved = {name: value / 2 for name, value in model.named_parameters()}
    found = run_with(model, halved, lambda network: network(inputs))
    assert torch.equal(model.last.weight, before["first.weight"])
    assert model.norm.num_batches_tracked == 1  # buffers are the model's own
    found.sum().backward()
    assert model.first.weight.grad.abs().sum() > 0
    by_hand = Tied()
    by_hand.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in by_hand.parameters():
            parameter /= 2
    torch.testing.assert_close(by_hand(inputs), found)  # tied weights were exchanged in both places
