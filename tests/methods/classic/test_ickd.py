import torch

from limbeck.objectives.channels import ickd
from tests.methods.classic.rig import both, build, check_gradients, labels_loss, student_net, update_of


def test_the_loss_is_the_weighted_sum_on_the_last_stage():
    method = build("ickd", label_weight=0.3, weight=0.7)
    features, ours, targets, _ = both(method)
    assert method.connectors["0"][0].weight.shape == (24, 16, 1, 1)
    term = ickd(method.connectors["0"](features[-1]), targets[-1])
    torch.testing.assert_close(update_of(method).loss, 0.3 * labels_loss(ours) + 0.7 * term)
    check_gradients(method)


def test_equal_channel_counts_need_no_connector():
    method = build("ickd", student=student_net(width=6))
    features, _, targets, _ = both(method)
    assert not method.connectors
    assert method.players() == {"student": method.student}
    torch.testing.assert_close(update_of(method).logs["objective"], ickd(features[-1], targets[-1]))
