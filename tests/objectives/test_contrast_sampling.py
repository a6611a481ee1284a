import torch

from limbeck.objectives.contrast_sampling import new_bank, other_class_negatives, uniform_negatives

LABELS = torch.tensor([2, 0, 1, 0, 2, 2, 1, 0, 2, 2])
ANCHORS = torch.tensor([0, 1, 2, 9])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_bank_is_uniform_and_of_about_unit_length():
    bank = new_bank(4000, 12, generator=generator())
    assert bank.shape == (4000, 12)
    assert bank.abs().max() <= 0.5  # the square root of 3 / 12
    assert bank.abs().max() > 0.49
    assert abs(bank.square().sum(1).mean() - 1) < 0.02
    assert abs(bank.mean()) < 0.01


def test_same_seed_same_draws():
    for draw in (
        lambda seed: new_bank(5, 3, generator=generator(seed)),
        lambda seed: uniform_negatives(ANCHORS, 6, 10, generator=generator(seed)),
        lambda seed: other_class_negatives(ANCHORS, 6, LABELS, generator=generator(seed)),
    ):
        assert torch.equal(draw(1), draw(1))
        assert not torch.equal(draw(1), draw(2))


def test_the_positive_comes_first():
    for drawn in (uniform_negatives(ANCHORS, 6, 10), other_class_negatives(ANCHORS.int(), 6, LABELS.int())):
        assert drawn.shape == (4, 7)
        assert torch.equal(drawn[:, 0], ANCHORS)


def test_uniform_negatives_are_uniform():
    drawn = uniform_negatives(ANCHORS, 20_000, 10, generator=generator())[:, 1:]
    frequency = torch.bincount(drawn.flatten(), minlength=10) / drawn.numel()
    assert frequency.shape == (10,)
    assert (frequency - 0.1).abs().max() < 0.005


def test_other_class_negatives_are_uniform_over_the_other_classes():
    drawn = other_class_negatives(ANCHORS, 20_000, LABELS, generator=generator())
    for row in drawn:
        allowed = LABELS[row[0]] != LABELS
        frequency = torch.bincount(row[1:], minlength=10) / 20_000
        assert frequency[~allowed].sum() == 0
        assert (frequency[allowed] - 1 / allowed.sum()).abs().max() < 0.015
