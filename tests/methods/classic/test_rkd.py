import torch

from limbeck.objectives.relations import rkd
from tests.methods.classic.rig import both, build, check_gradients, labels_loss, update_of


def test_the_loss_is_the_weighted_sum_on_pooled_features():
    method = build("rkd", label_weight=0.3, weight=0.7, distance_weight=2.0, angle_weight=3.0, squared=True)
    features, ours, targets, _ = both(method)
    pair = features[-1].mean((2, 3)), targets[-1].mean((2, 3))
    term = rkd(*pair, distance_weight=2.0, angle_weight=3.0, squared=True)
    torch.testing.assert_close(update_of(method).loss, 0.3 * labels_loss(ours) + 0.7 * term)
    check_gradients(method)


def test_defaults_are_those_of_the_paper():
    options = build("rkd").options
    assert (options.distance_weight, options.angle_weight, options.weight, options.squared) == (25, 50, 1, False)
