"""Batch-norm statistics: which layers count, the distance against a loop, its limits and gradients."""

import math

import pytest
import torch
from torch import nn

from limbeck.models.convnet import ConvNet
from limbeck.models.vit import VisionTransformer
from limbeck.synthesis.statistics import batch_norms, statistics_distance, statistics_matching


def test_the_distance_against_a_loop():
    torch.manual_seed(0)
    x, mean, variance = torch.randn(3, 2, 4, 5), torch.randn(2), torch.rand(2)
    gaps = [[], []]
    for channel in range(2):
        values = [v for image in x[:, channel].tolist() for row in image for v in row]
        centre = sum(values) / len(values)
        spread = sum((v - centre) ** 2 for v in values) / len(values)  # biased: divided by the count
        gaps[0].append(centre - float(mean[channel]))
        gaps[1].append(spread - float(variance[channel]))
    expected = sum(math.sqrt(sum(gap**2 for gap in side)) for side in gaps)  # plain norms, not squared
    assert float(statistics_distance(x, mean, variance)) == pytest.approx(expected, rel=1e-5)


def test_equal_statistics_cost_nothing_and_give_no_gradient():
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    mean, variance = x.detach().mean((0, 2, 3)), x.detach().var((0, 2, 3), correction=0)
    distance = statistics_distance(x, mean, variance)
    (gradient,) = torch.autograd.grad(distance, x)
    assert float(distance.detach()) == 0
    assert not gradient.any()
    unbiased = x.detach().var((0, 2, 3))
    assert float(statistics_distance(x.detach(), mean, unbiased)) > 1e-3


def test_the_gradient_is_that_of_finite_differences():
    torch.manual_seed(1)
    x = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    known = torch.randn(2, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda value: statistics_distance(value, *known), x)


def test_vectors_and_half_precision_are_taken_too():
    x, mean, variance = torch.randn(8, 4), torch.zeros(4), torch.ones(4)
    exact = statistics_distance(x.bfloat16().float(), mean, variance)
    assert torch.equal(statistics_distance(x.bfloat16(), mean, variance), exact)


def test_the_first_layer_has_its_own_multiplier():
    torch.manual_seed(2)
    features = [torch.randn(4, 2, 3, 3), torch.randn(4, 5), torch.randn(4, 3, 2)]
    known = [(torch.randn(x.shape[1]), torch.rand(x.shape[1])) for x in features]
    one, two, three = (float(statistics_distance(x, *k)) for x, k in zip(features, known, strict=True))
    assert float(statistics_matching(features, known)) == pytest.approx(10 * one + two + three, rel=1e-6)
    assert float(statistics_matching(features, known, first=0.5)) == pytest.approx(0.5 * one + two + three, rel=1e-6)
    with pytest.raises(ValueError, match="zip"):
        statistics_matching(features[:2], known)


def test_batch_norms_are_found_in_order_and_others_are_not():
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.InstanceNorm2d(2, track_running_stats=True),
        nn.GroupNorm(1, 2),
        nn.BatchNorm2d(2, track_running_stats=False),
        nn.Sequential(nn.SyncBatchNorm(2)),
    )
    found = batch_norms(net)
    assert list(found) == ["1", "5.0"]
    assert found["1"][0] is net[1].running_mean
    assert found["5.0"][1] is net[5][0].running_var
    assert len(batch_norms(ConvNet(width=4, depth=3))) == 3


def test_a_network_without_batch_norms_is_refused():
    vit = VisionTransformer(image_size=8, patch_size=4, channels=1, dim=8, depth=1, heads=2)
    with pytest.raises(ValueError, match="VisionTransformer has no batch norm"):
        batch_norms(vit)


def test_the_fused_batch_norms_of_timm_count():
    timm = pytest.importorskip("timm")
    model = timm.create_model("mnasnet_small", pretrained=False)  # BatchNormAct2d throughout
    kinds = {type(model.get_submodule(path)).__name__ for path in batch_norms(model)}
    assert "BatchNormAct2d" in kinds
    frozen = timm.layers.freeze_batch_norm_2d(model)
    assert len(batch_norms(frozen)) == len(batch_norms(model)) > 10
