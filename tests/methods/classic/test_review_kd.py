import pytest
import torch
import torch.nn.functional as F

from limbeck.core.method import Clock
from limbeck.objectives.features import hierarchical_context_loss
from tests.methods.classic.rig import batch, both, build, check_gradients, labels_loss, student_net, update_of


def by_hand(method, features, targets):
    """The review from deep to shallow, written out for four levels."""
    pool = [maps[-1].mean((2, 3), keepdim=True) for maps in (features, targets)]
    features, targets = [*features, pool[0]], [*targets, pool[1]]
    total, deeper = 0.0, None
    for level in (3, 2, 1, 0):
        fusion, target = method.connectors[str(level)], targets[level]
        hidden = fusion.reduce(features[level])
        if deeper is not None:
            deeper = F.interpolate(deeper, size=hidden.shape[2:], mode="nearest")
            gates = torch.sigmoid(fusion.attend[0](torch.cat([hidden, deeper], 1)))
            hidden = hidden * gates[:, 0:1] + deeper * gates[:, 1:2]
        hidden = F.interpolate(hidden, size=target.shape[2:], mode="nearest")
        total = total + hierarchical_context_loss(fusion.project(hidden), target)
        deeper = hidden
    return total


def test_the_loss_is_the_weighted_sum_over_levels():
    method = build("review-kd", label_weight=0.3, weight=0.7)
    features, ours, targets, _ = both(method)
    expected = 0.3 * labels_loss(ours) + 0.7 * by_hand(method, features, targets)
    torch.testing.assert_close(update_of(method).loss, expected)
    check_gradients(method)


def test_a_student_of_another_resolution_is_brought_to_the_teachers():
    named = ["stages.0", "stages.0.norm", "stages.1"]
    method = build("review-kd", student=student_net(depth=2), student_layers=named)
    features, _, targets, _ = both(method)
    with torch.no_grad():
        stage = method.student.stages[0]
        features = [features[0], stage.norm(stage.conv(batch().image)), features[1]]
    torch.testing.assert_close(update_of(method).logs["objective"], by_hand(method, features, targets))


def test_the_width_within_is_at_most_the_students():
    assert build("review-kd").connectors["0"].reduce[0].out_channels == 16
    assert build("review-kd", mid_channels=8).connectors["0"].reduce[0].out_channels == 8
    assert build("review-kd").options.mid_channels == 512


def test_the_deepest_level_has_nothing_to_fuse():
    connectors = build("review-kd").connectors
    assert [fusion.attend is None for fusion in connectors.values()] == [False, False, False, True]


@pytest.mark.parametrize(("epoch", "factor"), [(0, 0), (5, 0.25), (30, 1)])
def test_the_objective_warms_up_over_epochs(epoch, factor):
    method = build("review-kd")
    method.clock = Clock(step=1, steps=2, epoch=epoch)
    update = update_of(method)
    torch.testing.assert_close(update.loss, update.logs["cross_entropy"] + factor * update.logs["objective"])
