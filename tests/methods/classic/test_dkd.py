import pytest
import torch
import torch.nn.functional as F

from limbeck.core.batch import Batch
from limbeck.core.method import Clock
from limbeck.objectives.target_class import dkd
from tests.methods.classic.rig import batch, both, build, check_gradients, labels_loss, update_of


def test_the_loss_is_the_weighted_sum():
    method = build("dkd", label_weight=0.3, weight=0.7, target_weight=2.0, non_target_weight=5.0, temperature=3.0)
    _, ours, _, theirs = both(method)
    term = dkd(ours, theirs, batch().label, temperature=3.0, target_weight=2.0, non_target_weight=5.0)
    torch.testing.assert_close(update_of(method).loss, 0.3 * labels_loss(ours) + 0.7 * term)
    check_gradients(method)


def test_defaults_are_those_of_the_paper():
    options = build("dkd").options
    assert (options.target_weight, options.non_target_weight, options.temperature) == (1, 8, 4)
    assert (options.label_weight, options.weight, options.warmup_epochs) == (1, 1, 20)


@pytest.mark.parametrize(
    ("epoch", "epochs", "factor"), [(0, 20, 0), (5, 20, 0.25), (20, 20, 1), (90, 20, 1), (0, 0, 1)]
)
def test_the_objective_warms_up_over_epochs(epoch, epochs, factor):
    method = build("dkd", warmup_epochs=epochs)
    method.clock = Clock(step=1, steps=2, epoch=epoch)
    update = update_of(method)
    torch.testing.assert_close(update.loss, update.logs["cross_entropy"] + factor * update.logs["objective"])


def test_mixed_labels_are_split_at_the_largest():
    method, hard = build("dkd"), batch()
    soft = 0.8 * F.one_hot(hard.label, 10) + 0.02
    update = update_of(method, hard.replace(label=soft))
    torch.testing.assert_close(update.logs["objective"], update_of(method, hard).logs["objective"])
    assert update.logs["cross_entropy"] > 0


def test_items_without_a_label_are_split_at_the_teachers_choice():
    method, whole = build("dkd"), batch()
    guess = both(method)[3].argmax(1)
    guessed = update_of(method, whole.replace(label=guess)).logs["objective"]
    bare = Batch({"image": whole.image})
    torch.testing.assert_close(update_of(method, bare).logs["objective"], guessed)
    partly = torch.where(torch.arange(6) < 3, guess, -100)
    torch.testing.assert_close(update_of(method, whole.replace(label=partly)).logs["objective"], guessed)
