"""Matching against the oracles of DataDAM and FYI, plain loops and limits."""

import pytest
import torch

from limbeck.synthesis.matching import class_means, gradient_gap, mean_gap, spatial_attention
from tests.oracles.oracle import load

(DATADAM,) = load("datadam")
(FYI,) = load("fyi")


@pytest.mark.parametrize(
    ("name", "power", "norm"),
    [
        ("param1.exp1.l2", 1.0, "l2"),
        ("param0.exp4.l2", 1.0, "l2"),
        ("param1.exp4.l2", 4.0, "l2"),
        ("param1.exp2.l2", 2.0, "l2"),
        ("param1.exp2.l1", 2.0, "l1"),
        ("param1.exp4.none-vectorized", 4.0, "none"),
    ],
)
def test_attention_is_that_of_the_published_code(name, power, norm):
    actual = spatial_attention(DATADAM.tensors["feat"], power, norm)
    torch.testing.assert_close(actual, DATADAM.tensors[f"att.{name}"], rtol=1e-5, atol=1e-7)


def test_losses_and_gradients_are_those_of_the_published_code():
    seen, tensors = {}, DATADAM.tensors
    real_labels, labels = torch.arange(3).repeat_interleave(4), torch.arange(3).repeat_interleave(2)
    features = tensors["loss.feat_syn"].clone().requires_grad_()
    embedding = tensors["loss.emb_syn"].clone().requires_grad_()
    seen["real"], counts = class_means(spatial_attention(tensors["loss.feat_real"], 1.0), real_labels, 3)
    seen["own"], _ = class_means(spatial_attention(features, 1.0), labels, 3)
    attention = 100 * mean_gap(seen["real"], seen["own"], counts)
    real, _ = class_means(tensors["loss.emb_real"], real_labels, 3)
    output = 100 * 0.01 * mean_gap(real, class_means(embedding, labels, 3)[0], counts)
    (attention + output).backward()
    for actual, name in (
        (attention, "loss.att"),
        (output, "loss.out"),
        (features.grad, "loss.datt_dfeat_syn"),
        (embedding.grad, "loss.dout_demb_syn"),
    ):
        expected = tensors[name]
        assert (actual.detach() - expected).abs().max() <= 1e-5 * expected.abs().max(), name


def test_attention_has_unit_norm_and_forgets_the_scale():
    features = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    for power in (1.0, 4.0):
        attention = spatial_attention(features, power)
        torch.testing.assert_close(attention.norm(dim=1), torch.ones(4))
        torch.testing.assert_close(spatial_attention(7 * features, power), attention)
    dead = torch.zeros(1, 3, 2, 2, requires_grad=True)
    spatial_attention(dead).sum().backward()
    assert (dead.grad == 0).all()


def test_class_means_leave_out_what_has_no_label():
    values = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, -100, 2, 0, 2, 2])
    means, counts = class_means(values, labels, 4)
    assert counts.tolist() == [2, 0, 3, 0]
    torch.testing.assert_close(means[0], (values[0] + values[3]) / 2)
    torch.testing.assert_close(means[2], (values[2] + values[4] + values[5]) / 3)
    assert (means[[1, 3]] == 0).all()


def test_classes_that_are_absent_and_equal_means_cost_nothing():
    one, other = torch.randn(3, 4), torch.randn(3, 4)
    assert mean_gap(one, one, torch.ones(3)) == 0
    by_hand = ((one[0] - other[0]) ** 2).sum() + ((one[2] - other[2]) ** 2).sum()
    torch.testing.assert_close(mean_gap(one, other, torch.tensor([5.0, 0.0, 1.0])), by_hand)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(mean_gap(one[order], other[order], torch.ones(3)), mean_gap(one, other, torch.ones(3)))


@pytest.mark.parametrize(("measure", "theirs"), [("rows", "ours"), ("mse", "mse"), ("cosine", "cos")])
def test_gradient_gaps_are_those_of_the_published_code(measure, theirs):
    count = sum(name.startswith("match.real") for name in FYI.tensors)
    real = [FYI.tensors[f"match.real{n}"] for n in range(count)]
    found = [FYI.tensors[f"match.syn{n}"].clone().requires_grad_() for n in range(count)]
    gap = gradient_gap(real, found, measure)
    gap.backward()
    torch.testing.assert_close(gap.detach(), FYI.tensors[f"match.{theirs}.loss"], rtol=1e-5, atol=0)
    seen = 0
    for number, tensor in enumerate(found):
        expected = FYI.tensors.get(f"match.{theirs}.grad{number}")
        if expected is None:
            assert tensor.grad is None
            continue
        seen += 1
        assert (tensor.grad - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert seen >= 3


def test_equal_gradients_cost_nothing_and_a_row_of_zeros_one():
    one = [torch.randn(4, 3), torch.randn(4)]
    assert gradient_gap(one, one) < 1e-5
    assert float(gradient_gap(one, [torch.zeros(4, 3), one[1]])) == 4.0
