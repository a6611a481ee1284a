import pytest
import torch
from torch import nn

from limbeck.core.errors import IncompatibleError
from limbeck.core.warm_start import start_from
from limbeck.models.denoising_mlp import DenoisingMLP


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


class Large(Small):
    """With a branch of two layers, and a bare weight of its own."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(2, 5), nn.SiLU(), nn.Linear(5, 4))
        self.gain = nn.Parameter(torch.ones(4))


def test_all_weights_come_over_and_new_parts_are_silent_but_learn():
    torch.manual_seed(0)
    small, large = Small(), Large()
    small.body[1].running_mean.fill_(3.0)
    first = large.branch[0].weight.clone()
    new = start_from(large, small)
    assert sorted(new) == ["branch.0.bias", "branch.0.weight", "branch.2.bias", "branch.2.weight", "gain"]
    for name, value in small.state_dict().items():
        assert torch.equal(large.state_dict()[name], value), name
    assert not large.branch[2].weight.any()
    assert not large.branch[2].bias.any()
    assert not large.gain.any()
    assert torch.equal(large.branch[0].weight, first)
    large.branch(torch.ones(1, 2)).sum().backward()
    assert large.branch[2].weight.grad.any()


def test_a_network_of_the_same_kind_has_nothing_new():
    torch.manual_seed(0)
    one, other = Small(), Small()
    assert start_from(one, other) == []
    assert torch.equal(one.body[0].weight, other.body[0].weight)


def test_a_denoiser_with_a_guidance_input_predicts_what_the_one_without_does():
    torch.manual_seed(0)
    plain = DenoisingMLP(numbers=4, classes=2, width=8, depth=1)
    told = DenoisingMLP(numbers=4, classes=2, width=8, depth=1, guidance=True)
    torch.nn.init.ones_(told.guidance.weight)
    assert start_from(told, plain) == ["guidance.weight", "guidance.bias"]
    x, time, label = torch.randn(3, 4), torch.rand(3), torch.tensor([0, 1, 1])
    condition = {"label": label, "guidance": torch.tensor([1.0, 3.0, 7.0])}
    assert torch.equal(told(x, time, condition), plain(x, time, {"label": label}))


@pytest.mark.parametrize("width", [4, 16])
def test_another_shape_is_refused_before_anything_changes(width):
    torch.manual_seed(0)
    student = DenoisingMLP(numbers=4, width=8, depth=1)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(IncompatibleError, match="cannot start from the teacher") as caught:
        start_from(student, DenoisingMLP(numbers=4, width=width, depth=1))
    assert "initialise" in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


def test_a_weight_without_a_counterpart_is_refused():
    with pytest.raises(IncompatibleError, match=r"'branch.0.weight'.*missing|'gain'.*missing"):
        start_from(Small(), Large())
