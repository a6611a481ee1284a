"""DisWOT's distillers: the loss as the weighted sum of its terms."""

import pytest
import torch

from limbeck.core.errors import IncompatibleError
from limbeck.objectives.logits import kd
from limbeck.objectives.network_similarity import class_channel_map, rmi, semantic_difference
from limbeck.objectives.relations import similarity_preserving
from tests.methods.classic.rig import batch, both, build, check_gradients, labels_loss, student_net, update_of


def terms(method):
    features, ours, targets, theirs = both(method)
    maps = [
        class_channel_map(logits, side[-1].mean((2, 3)), batch().label)
        for logits, side in ((ours, features), (theirs, targets))
    ]
    return features, ours, targets, theirs, maps


@pytest.mark.parametrize("width", [4, 6])
def test_the_loss_is_the_weighted_sum(width):
    weights = {"relation_weight": 5.0, "semantic_weight": 0.3, "rmi_weight": 0.2}
    method = build(
        "diswot-kd", student=student_net(width=width), label_weight=0.4, weight=0.7, kd_weight=0.6, **weights
    )
    features, ours, targets, theirs, maps = terms(method)
    axis = "channel" if width == 6 else "class"
    found = {
        "relation": similarity_preserving(features[-1], targets[-1]),
        "semantic": semantic_difference(*maps, axis=axis),
        "rmi": rmi(features, targets),
    }
    objective = 5.0 * found["relation"] + 0.3 * found["semantic"] + 0.2 * found["rmi"]
    update = update_of(method)
    torch.testing.assert_close(
        update.loss, 0.4 * labels_loss(ours) + 0.7 * objective + 0.6 * kd(ours, theirs, temperature=4.0)
    )
    for name, value in found.items():
        torch.testing.assert_close(update.logs[name], value)
    check_gradients(method)


def test_without_the_hinton_term_the_teacher_still_runs_to_its_head():
    method = build("diswot-kd", kd_weight=0.0, relation_weight=0.0)
    *_, ours, _, _, maps = terms(method)
    expected = labels_loss(ours) + 2.5 * semantic_difference(*maps, axis="class")
    torch.testing.assert_close(update_of(method).loss, expected)


def test_defaults():
    options = build("diswot-kd").options
    assert (options.relation_weight, options.semantic_weight, options.rmi_weight) == (1000, 2.5, 0)
    assert "rmi" not in update_of(build("diswot-kd")).logs


def test_equal_networks_cost_nothing():
    net = student_net()
    method = build("diswot-kd", student=student_net().train(), teacher=net, rmi_weight=1.0)
    method.student.eval()
    assert float(update_of(method).logs["objective"].detach()) == pytest.approx(0.0, abs=1e-4)


def test_a_teacher_without_a_network_is_refused():
    class Distant:
        layers = ("stages.1",)

        def signal(self, batch, layers=()):
            from limbeck.core.teacher import TeacherSignal

            return TeacherSignal(
                torch.zeros(batch.size, 10), {name: torch.zeros(batch.size, 3, 2, 2) for name in layers}
            )

        def to(self, device):
            pass

    with pytest.raises(IncompatibleError, match="head"):
        build("diswot-kd", teacher=Distant(), student_layers=["stages.1"])
