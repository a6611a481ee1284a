"""The space of a model's arguments, and fresh weights."""

import random

import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.models.cell import CellNet
from limbeck.models.configs import CellNetConfig
from limbeck.models.convnet import ConvNet
from limbeck.models.describe import count_parameters
from limbeck.search.initialisation import reinitialised
from limbeck.search.space import ArgumentSpace, with_arguments

GENES = {"width": [2, 4, 6], "depth": [1, 2], "norm": ["batch"]}


def build(arguments, seed):
    torch.manual_seed(seed or 0)
    return ConvNet(**arguments)


@pytest.fixture
def space():
    return ArgumentSpace(GENES, build, Batch({"image": torch.zeros(1, 1, 8, 8)}))


def test_all_architectures_come_once(space):
    everything = list(space)
    assert len(everything) == len(set(everything)) == len(space) == 6
    assert space.arguments(everything[-1]) == {"width": 6, "depth": 2, "norm": "batch"}


def test_samples_cover_the_space(space):
    draws = random.Random(0)
    assert {space.sample(draws) for _ in range(200)} == set(space)


def test_a_mutation_changes_one_gene_to_another_value(space):
    draws, seen = random.Random(0), set()
    for _ in range(100):
        mutated = space.mutate((0, 0, 0), draws)
        assert sum(one != 0 for one in mutated) == 1
        seen.add(mutated)
    assert seen == {(1, 0, 0), (2, 0, 0), (0, 1, 0)}  # the gene with a single value stays


def test_a_space_without_choice_has_no_mutations():
    space = ArgumentSpace({}, build, Batch({"image": torch.zeros(1, 1, 8, 8)}))
    assert list(space) == [()]
    assert space.mutate((), random.Random(0)) == ()


def test_costs_are_those_of_the_network(space):
    cost = space.cost((0, 0, 0))
    # A 3x3 convolution from 1 to 2 channels on 8x8 positions, batch norm, and a head from 2 to 10.
    assert cost.parameters == 9 * 2 + 2 * 2 + 2 * 10 + 10
    assert cost.flops == 2 * (9 * 2 * 64 + 2 * 10)
    assert space.cost((2, 1, 0)).flops > cost.flops
    assert cost.parameters == count_parameters(space.build((0, 0, 0), 3))


def test_arguments_are_merged_by_name_and_by_path():
    base = {"layers": [1, 2, {"a": 3}], "width": 8}
    merged = with_arguments(base, {"width": 4, "layers.0": 7, "layers.2.a": [5], "new": True})
    assert merged == {"layers": [7, 2, {"a": [5]}], "width": 4, "new": True}
    assert base == {"layers": [1, 2, {"a": 3}], "width": 8}


@pytest.mark.parametrize("path", ["missing.0", "layers.9", "layers.x", "width.0"])
def test_a_path_that_leads_nowhere_is_refused(path):
    with pytest.raises(IncompatibleError, match=r"student\.arguments"):
        with_arguments({"layers": [1, 2], "width": 8}, {path: 1})


def test_fresh_weights_are_a_function_of_the_seed_and_leave_the_model_alone():
    model = CellNet(channels=1, width=4, cells=1).eval().requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    one, same, other = (reinitialised(model, "default", seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in one.state_dict().items())
    weights = [(name, value) for name, value in one.named_parameters() if value.ndim > 1]
    assert all(not torch.equal(value, before[name]) for name, value in weights)
    assert all(not torch.equal(value, other.get_parameter(name)) for name, value in weights)
    assert one.training
    assert not model.training
    assert all(value.requires_grad for value in one.parameters())


def test_normal_weights_have_unit_variance_and_no_bias():
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Flatten(), nn.Linear(64, 200))
    nn.init.constant_(model[1].weight, 5.0)
    model[1].running_mean += 3
    fresh = reinitialised(model, "normal", 0)
    for layer in (fresh[0], fresh[3]):
        layer.requires_grad_(False)
        assert float(layer.weight.std()) == pytest.approx(1.0, abs=0.05)
        assert float(layer.weight.mean()) == pytest.approx(0.0, abs=0.05)
        assert layer.bias.abs().max() == 0
    assert torch.equal(fresh[1].weight, torch.ones(64))
    assert torch.equal(fresh[1].running_mean, torch.zeros(64))
    assert reinitialised(model, "default", 0)[3].weight.std() < 0.2


class TestCellNet:
    """The network of the cell space."""

    def test_the_configuration_rebuilds_it(self):
        model = CellNet(channels=3, classes=7, width=4, cells=2, edge_10="none", edge_21="pool", edge_32="conv1")
        again = CellNet(**model.config)
        again.load_state_dict(model.state_dict())
        image = torch.randn(3, 3, 7, 9)
        assert torch.equal(again.eval()(image), model.eval()(image))
        assert CellNetConfig.model_validate(model.config).edge_21 == "pool"

    def test_a_cell_is_the_sum_over_its_edges(self):
        torch.manual_seed(0)
        names = {"edge_10": "conv1", "edge_20": "pool", "edge_21": "skip"}
        names |= {"edge_30": "none", "edge_31": "conv3", "edge_32": "skip"}
        cell = CellNet(width=4, cells=1, **names).eval().stages[0][0]
        x = torch.randn(2, 4, 5, 5)
        one = cell.nodes[0][0](x)
        two = nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False) + one
        torch.testing.assert_close(cell(x), cell.nodes[2][1](one) + two)

    @pytest.mark.parametrize("size", [1, 7, 32])
    def test_stages_halve_the_map_and_every_weight_is_reached(self, size):
        model = CellNet(width=4, cells=1).train()
        features = model.stem(torch.randn(4, 3, size, size))
        for stage, module in enumerate(model.stages):
            features = module(features)
            assert features.shape[1:] == (4 * 2**stage, *[-(-size // 2**stage)] * 2)
        model(torch.randn(4, 3, size, size)).square().sum().backward()
        assert all(weight.grad is not None for weight in model.parameters())

    def test_only_convolutions_have_weights(self):
        plain = {f"edge_{e}": "none" for e in ("10", "20", "21", "30", "31", "32")}
        none, skip, pool = (
            count_parameters(CellNet(width=4, cells=1, **dict.fromkeys(plain, op))) for op in ("none", "skip", "pool")
        )
        assert none == skip == pool < count_parameters(CellNet(width=4, cells=1, **{**plain, "edge_10": "conv1"}))


class TestConvNetGenes:
    """What the search varies in the plain network."""

    def test_kernel_skip_and_neck(self):
        net = ConvNet(width=3, depth=2, blocks=2, kernel=1, skip=True, neck=7).eval()
        image = torch.randn(2, 1, 8, 8)
        stage = net.stages[0]
        first = (stage.body[0][1](stage.body[0][0](image)) + stage.shortcuts[0](image)).relu()
        expected = (stage.norm(stage.conv(first)) + first).relu()
        torch.testing.assert_close(stage(image), expected)
        assert stage.body[0][0].kernel_size == (3, 3)  # the first convolution sees the image
        assert {net.stages[1].body[0][0].kernel_size, stage.conv.kernel_size} == {(1, 1)}
        assert net.stages(image).shape == (2, 7, 4, 4)
        assert net.layers() == ["stages.0", "stages.1", "stages.2"]

    def test_without_them_nothing_has_changed(self):
        torch.manual_seed(0)
        names = set(ConvNet(width=3, depth=2, blocks=2).state_dict())
        assert not [name for name in names if "shortcut" in name]
        assert len(names) == 2 * 2 * 6 + 2
