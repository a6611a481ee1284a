import torch

from limbeck.core.batch import Batch
from limbeck.objectives.target_class import nkd
from tests.methods.classic.rig import batch, both, build, check_gradients, labels_loss, update_of


def test_the_loss_is_the_weighted_sum():
    method = build("nkd", label_weight=0.3, weight=0.7, non_target_weight=2.0, temperature=3.0)
    _, ours, _, theirs = both(method)
    term = nkd(ours, theirs, batch().label, temperature=3.0, non_target_weight=2.0)
    torch.testing.assert_close(update_of(method).loss, 0.3 * labels_loss(ours) + 0.7 * term)
    check_gradients(method)


def test_without_labels_the_teachers_choice_is_the_target():
    method = build("nkd")
    guess = both(method)[3].argmax(1)
    guessed = update_of(method, batch().replace(label=guess)).logs["objective"]
    torch.testing.assert_close(update_of(method, Batch({"image": batch().image})).logs["objective"], guessed)
