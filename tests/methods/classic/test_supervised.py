import torch
import torch.nn.functional as F

from limbeck.core.method import DataInfo
from limbeck.core.registry import method_class
from tests.methods.classic.rig import CLASSES, ITEMS, batch, student_net, update_of


def made(**options):
    kind = method_class("supervised")
    info = DataInfo(ITEMS, CLASSES, batch(2))
    return kind(kind.Options(**options), student=student_net(), data=info).train()


def test_the_loss_is_the_cross_entropy_and_reaches_the_student():
    for smoothing in (0.0, 0.2):
        method = made(label_smoothing=smoothing)
        update = update_of(method)
        expected = F.cross_entropy(method.student(batch().image), batch().label, label_smoothing=smoothing)
        torch.testing.assert_close(update.loss, expected)
        update.loss.backward()
        assert all(parameter.grad is not None for parameter in method.student.parameters())


def test_items_without_a_label_add_nothing():
    method, items = made(), batch()
    some = items.replace(label=torch.where(torch.arange(6) < 4, items.label, -100))
    expected = F.cross_entropy(method.student(items.image)[:4], items.label[:4]) * 4 / 6
    torch.testing.assert_close(update_of(method, some).loss, expected)
