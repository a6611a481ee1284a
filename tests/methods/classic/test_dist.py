import torch

from limbeck.objectives.logits import dist
from tests.methods.classic.rig import both, build, check_gradients, labels_loss, update_of


def test_the_loss_is_the_weighted_sum():
    method = build("dist", label_weight=0.3, weight=0.7, inter_weight=2.0, intra_weight=0.5, temperature=4.0)
    _, ours, _, theirs = both(method)
    term = dist(ours, theirs, temperature=4.0, inter_weight=2.0, intra_weight=0.5)
    torch.testing.assert_close(update_of(method).loss, 0.3 * labels_loss(ours) + 0.7 * term)
    check_gradients(method)
