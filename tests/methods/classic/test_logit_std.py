import torch

from limbeck.objectives.logits import kd, standardise_logits
from tests.methods.classic.rig import both, build, check_gradients, labels_loss, update_of


def test_the_loss_is_the_weighted_sum():
    method = build("logit-std", label_weight=0.3, weight=0.7, temperature=3.0)
    _, ours, _, theirs = both(method)
    term = kd(standardise_logits(ours), standardise_logits(theirs), temperature=3.0)
    torch.testing.assert_close(update_of(method).loss, 0.3 * labels_loss(ours) + 0.7 * term)
    check_gradients(method)


def test_the_size_of_the_teachers_logits_does_not_matter():
    method = build("logit-std")
    before = update_of(method).logs["objective"]
    with torch.no_grad():
        method.teacher.model.head.weight.mul_(7)
        method.teacher.model.head.bias.mul_(7).add_(3)
    torch.testing.assert_close(update_of(method).logs["objective"], before)
