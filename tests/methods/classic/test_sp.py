import torch

from limbeck.objectives.relations import similarity_preserving
from tests.methods.classic.rig import both, build, check_gradients, labels_loss, update_of


def test_the_loss_is_the_weighted_sum_on_the_last_stage():
    method = build("sp", label_weight=0.3, weight=0.7)
    features, ours, targets, _ = both(method)
    term = similarity_preserving(features[-1], targets[-1])
    torch.testing.assert_close(update_of(method).loss, 0.3 * labels_loss(ours) + 0.7 * term)
    check_gradients(method)


def test_several_layers_add_up():
    layers = {"student_layers": ["stages.0", "stages.2"], "teacher_layers": ["stages.1", "stages.2"]}
    method = build("sp", **layers)
    features, _, targets, _ = both(method)
    term = similarity_preserving(features[0], targets[1]) + similarity_preserving(features[2], targets[2])
    torch.testing.assert_close(update_of(method).logs["objective"], term)
