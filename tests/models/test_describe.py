"""Size, cost, layers and normalisation of models."""

import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.models.convnet import ConvNet
from limbeck.models.describe import count_flops, count_parameters, default_layers, latency
from limbeck.models.mlp import MLP
from limbeck.models.normalisation import normalisation_of, set_normalisation
from tests.models.information import information


def test_parameters_are_counted_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    assert count_parameters(model) == 24
    model[1].weight = model[0].weight
    assert count_parameters(model) == 15


def test_flops_are_two_for_each_multiplication_and_addition_and_per_item():
    model = MLP(inputs=64, classes=10, width=32, depth=1)
    batch = information().example
    assert count_flops(model, batch) == 2 * (64 * 32 + 32 * 10)
    network = ConvNet(width=4, depth=2, classes=3)
    expected = 2 * (9 * 1 * 4 * 8 * 8 + 9 * 4 * 8 * 4 * 4 + 8 * 3)
    assert count_flops(network, batch) == expected
    assert count_flops(network, batch.select(slice(0, 1))) == expected


def test_measuring_leaves_the_model_as_it_was():
    model = ConvNet().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert 0 < latency(model, information().example, repeats=3) < 1
    count_flops(model, information().example)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_layers_of_one_s_own_model_are_its_largest_list():
    model = nn.Module()
    model.small = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model.trunk = nn.ModuleDict({"blocks": nn.ModuleList(nn.Sequential(nn.Linear(9, 9), nn.ReLU()) for _ in range(3))})
    assert default_layers(model) == ["trunk.blocks.0", "trunk.blocks.1", "trunk.blocks.2"]
    assert default_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == ["0", "1"]
    with pytest.raises(IncompatibleError, match="no list of stages"):
        default_layers(nn.Linear(2, 2))


def test_layers_named_by_an_attribute_are_a_list_like_any_other():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    assert default_layers(model) == ["layers.0", "layers.1"]


def test_a_normalisation_must_be_one():
    with pytest.raises(ValueError, match="above 0"):
        set_normalisation(ConvNet(), [0.5], [0.0])
    assert normalisation_of(ConvNet()) is None


def test_a_model_without_a_batch_it_can_take_is_refused():
    with pytest.raises(IncompatibleError):
        count_flops(ConvNet(), Batch({"sound": torch.zeros(1, 2)}))
