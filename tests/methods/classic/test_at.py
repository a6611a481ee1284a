import pytest
import torch

from limbeck.objectives.features import attention_transfer
from tests.methods.classic.rig import both, build, check_gradients, labels_loss, update_of


@pytest.mark.parametrize("power", [1, 2])
def test_the_loss_is_the_weighted_sum_over_stages(power):
    method = build("at", label_weight=0.3, weight=0.7, power=power)
    features, ours, targets, _ = both(method)
    term = sum(attention_transfer(s, t, power=power) for s, t in zip(features, targets, strict=True))
    torch.testing.assert_close(update_of(method).loss, 0.3 * labels_loss(ours) + 0.7 * term)
    check_gradients(method)


def test_defaults_are_those_of_the_paper():
    assert (build("at").options.weight, build("at").options.power) == (1000, 2)
