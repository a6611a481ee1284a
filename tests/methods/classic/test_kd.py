import pytest
import torch

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.objectives.logits import kd
from tests.methods.classic.rig import batch, both, build, check_gradients, labels_loss, teacher_net, update_of


def test_the_loss_is_the_weighted_sum():
    method = build("kd", label_weight=0.3, weight=0.7, temperature=2.0)
    _, ours, _, theirs = both(method)
    update = update_of(method)
    torch.testing.assert_close(update.loss, 0.3 * labels_loss(ours) + 0.7 * kd(ours, theirs, temperature=2.0))
    torch.testing.assert_close(update.logs["cross_entropy"], labels_loss(ours))
    check_gradients(method)


def test_unlabelled_items_count_in_the_objective_alone():
    method, labelled = build("kd", label_weight=1.0), batch()
    unlabelled = labelled.replace(label=torch.where(torch.arange(6) < 4, labelled.label, -100))
    _, ours, _, theirs = both(method)
    update = update_of(method, unlabelled)
    first_four = torch.nn.functional.cross_entropy(ours[:4], labelled.label[:4]) * 4 / 6
    torch.testing.assert_close(update.logs["cross_entropy"], first_four)
    torch.testing.assert_close(update.logs["objective"], kd(ours, theirs, temperature=4.0))


def test_labels_are_not_needed():
    update = update_of(build("kd", weight=0.5), Batch({"image": batch().image}))
    torch.testing.assert_close(update.loss, 0.5 * update.logs["objective"])


@pytest.mark.parametrize(
    ("slug", "options"), [("kd", {}), ("dkd", {}), ("deit", {"token": False}), ("at", {"kd_weight": 1.0})]
)
def test_a_teacher_of_other_classes_is_refused(slug, options):
    with pytest.raises(IncompatibleError, match="the student has 10 classes and the teacher 7"):
        update_of(build(slug, teacher=teacher_net(classes=7), **options))


def test_features_can_be_matched_with_a_teacher_of_other_classes():
    assert update_of(build("rkd", teacher=teacher_net(classes=7))).loss.isfinite()


def test_a_student_equal_to_its_teacher_has_nothing_to_learn():
    method = build("kd", student=teacher_net())
    method.student.eval()
    assert update_of(method).logs["objective"].item() == pytest.approx(0, abs=1e-6)
