import torch

from limbeck.objectives.channels import nst
from tests.methods.classic.rig import both, build, check_gradients, labels_loss, update_of


def test_the_loss_is_the_weighted_sum_over_stages():
    method = build("nst", label_weight=0.3, weight=0.7)
    features, ours, targets, _ = both(method)
    term = sum(map(nst, features, targets))
    torch.testing.assert_close(update_of(method).loss, 0.3 * labels_loss(ours) + 0.7 * term)
    check_gradients(method)
