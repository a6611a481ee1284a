import torch

from limbeck.objectives.logits import soft_cross_entropy
from tests.methods.classic.rig import both, build, check_gradients, labels_loss, update_of


def test_the_loss_is_the_weighted_sum():
    method = build("soft-ce", label_weight=0.3, weight=0.7, temperature=2.0)
    _, ours, _, theirs = both(method)
    expected = 0.3 * labels_loss(ours) + 0.7 * soft_cross_entropy(ours, theirs, temperature=2.0)
    torch.testing.assert_close(update_of(method).loss, expected)
    check_gradients(method)


def test_it_trains_like_kd():
    gradients = []
    for slug in ("soft-ce", "kd"):
        method = build(slug)
        update_of(method).loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in method.student.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
