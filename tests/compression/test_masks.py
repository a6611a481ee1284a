"""Masks, patterns, saliencies and the schedule."""

import copy

import pytest
import torch
from torch import nn

from limbeck.compression.masks import (
    Masks,
    Pattern,
    keep_globally,
    keep_largest,
    keep_pattern,
    sparsity_report,
)
from limbeck.compression.saliency import saliency
from limbeck.compression.schedules import cubic_sparsity, pruning_step


def test_exactly_the_smallest_go_and_ties_fall_to_the_first():
    scores = torch.tensor([[[3.0, 1.0, 2.0, 1.0], [0.0, 5.0, 1.0, 4.0]]])
    assert keep_largest(scores, 0.5).tolist() == [[[True, False, True, False], [False, True, False, True]]]
    assert keep_largest(scores, 0.25).tolist() == [[[True, False, True, True], [False, True, True, True]]]
    assert keep_largest(scores, 0.5, "row").sum(-1).tolist() == [[2, 2]]
    assert keep_largest(scores, 0.25, "row").tolist() == [[[True, False, True, True], [False, True, True, True]]]
    assert keep_largest(scores, 0.0).all()
    assert not keep_largest(scores, 1.0).any()
    equal = keep_largest(torch.ones(2, 7, 9), 0.4)
    assert int((~equal).sum()) == round(0.4 * 2 * 7 * 9)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        keep_largest(scores, 1.5)


@pytest.mark.parametrize("text", ["2:4", "1:4", "16:32", "16:64"])
def test_a_pattern_keeps_the_largest_of_each_run(text):
    pattern = Pattern.parse(text)
    scores = torch.rand(2, 3, 128)
    keep = keep_pattern(scores, pattern)
    for group in range(2):
        for row in range(3):
            for start in range(0, 128, pattern.run):
                values = scores[group, row, start : start + pattern.run].tolist()
                kept = keep[group, row, start : start + pattern.run].tolist()
                smallest_kept = min(v for v, k in zip(values, kept, strict=True) if k)
                assert sum(kept) == pattern.kept
                assert all(k or v <= smallest_kept for v, k in zip(values, kept, strict=True))
    assert float((~keep).float().mean()) == pytest.approx(pattern.sparsity)


def test_what_is_no_pattern_is_refused():
    assert Pattern.parse("unstructured") is None
    for wrong in ("4:2", "2:2", "0:4", "two of four", "2:4 "):
        with pytest.raises(ValueError, match="no pattern"):
            Pattern.parse(wrong)
    with pytest.raises(ValueError, match="runs of 4"):
        keep_pattern(torch.rand(1, 2, 6), Pattern(2, 4))


def test_a_global_choice_compares_layers_with_each_other():
    scores = {"a": torch.tensor([[[1.0, 2.0]]]), "b": torch.tensor([[[3.0], [0.5]]])}
    keep = keep_globally(scores, 0.5)
    assert keep["a"].tolist() == [[[False, True]]]
    assert keep["b"].tolist() == [[[True], [False]]]


def test_saliencies_by_their_definitions():
    weight, x = torch.randn(2, 3, 4), torch.randn(2, 50, 4)
    products = x.mT @ x
    assert torch.equal(saliency("magnitude", weight), weight.abs())
    norms = x.square().sum(1).sqrt()
    expected = weight.abs() * norms[:, None]
    torch.testing.assert_close(saliency("wanda", weight, products), expected)
    torch.testing.assert_close(saliency("wanda", weight, x.square().sum(1)), expected)
    for group in range(2):
        matrix = products[group].double()
        matrix = matrix + 0.02 * matrix.diagonal().mean() * torch.eye(4)
        inverse = torch.linalg.inv(matrix)
        for row in range(3):
            for j in range(4):
                expected = float(weight[group, row, j]) ** 2 / float(inverse[j, j])
                found = float(saliency("obs", weight, products, damping=0.02)[group, row, j])
                assert found == pytest.approx(expected, rel=1e-4)
    for criterion in ("wanda", "obs"):
        with pytest.raises(ValueError, match="products"):
            saliency(criterion, weight)
    with pytest.raises(ValueError, match="damping"):
        saliency("obs", weight, products, damping=0.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, betas=(0.99, 0.999)),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    ],
)
def test_zeros_outlive_momentum_and_weight_decay(make):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = make(net.parameters())
    for _ in range(3):  # so that there is momentum for what is masked
        net(torch.randn(5, 6)).square().sum().backward()
        optimizer.step()
    masks = Masks({"0.weight": keep_largest(net[0].weight.detach().abs()[None], 0.75)[0]})
    masks.apply_to(net)
    before = net[0].weight.detach().clone()
    for _ in range(5):
        optimizer.zero_grad()
        net(torch.randn(5, 6)).square().sum().backward()
        optimizer.step()
        assert (net[0].weight[~masks["0.weight"]] != 0).any()  # the optimizer did move them
        masks.apply_to(net)
        assert (net[0].weight == 0).sum() == 36
        assert not net[0].weight[~masks["0.weight"]].any()
    assert (net[0].weight[masks["0.weight"]] != before[masks["0.weight"]]).all()
    assert (net[2].weight != 0).all()


def test_masked_gradients_leave_the_norm_alone_until_the_hooks_are_removed():
    net = nn.Linear(4, 2)
    masks = Masks({"weight": torch.tensor([[True, False, True, False], [False] * 4])})
    handles = masks.mask_gradients(net)
    net(torch.rand(3, 4)).sum().backward()
    assert (net.weight.grad != 0).tolist() == masks["weight"].tolist()
    assert (net.bias.grad != 0).all()
    for handle in handles:
        handle.remove()
    net.zero_grad()
    net(torch.rand(3, 4)).sum().backward()
    assert (net.weight.grad != 0).all()


def test_masks_are_saved_as_buffers_and_never_grow():
    net = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad():
        net[0].weight[0] = 0
    masks = Masks.of_zeros(net, ["0.weight"])
    assert float(masks.sparsity()) == 0.25
    other = Masks({"0.weight": torch.ones(4, 4, dtype=torch.bool)})
    other.load_state_dict(copy.deepcopy(masks.state_dict()))
    assert torch.equal(other["0.weight"], masks["0.weight"])
    assert masks.double()["0.weight"].dtype is torch.bool
    masks.narrow("0.weight", torch.eye(4).bool())
    assert masks["0.weight"].diagonal().tolist() == [False, True, True, True]
    assert int(masks["0.weight"].sum()) == 3
    masks.apply_to(net)
    assert sparsity_report(net, ["0.weight"]) == {"sparsity": 13 / 16, "sparsity_by_layer": {"0": 13 / 16}}


def test_the_cubic_schedule():
    assert cubic_sparsity(0.0, 0.8) == 0
    assert cubic_sparsity(1.0, 0.8) == 0.8
    assert cubic_sparsity(0.0, 0.8, 0.3) == pytest.approx(0.3)
    assert cubic_sparsity(0.5, 0.8) == pytest.approx(0.8 * (1 - 0.125))
    assert cubic_sparsity(2.0, 0.8) == 0.8
    values = [cubic_sparsity(k / 10, 0.9, 0.1) for k in range(11)]
    assert values == sorted(values)
    assert values[1] - values[0] > values[-1] - values[-2]  # fast at first


def test_when_prunings_are_due():
    due = {step: pruning_step(step, 10, 47, 10) for step in range(60)}
    found = {step: progress for step, progress in due.items() if progress is not None}
    assert found == pytest.approx({10: 0.0, 20: 1 / 3, 30: 2 / 3, 40: 1.0})
    alone = [pruning_step(step, 5, 5, 10) for step in range(30)]
    assert [step for step, progress in enumerate(alone) if progress is not None] == [5]
    assert alone[5] == 1.0
