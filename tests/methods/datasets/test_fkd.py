"""FKD: the loss by hand, labels read as they were stored, and a folder that belongs to another teacher."""

import math

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import Clock, Method
from limbeck.core.registry import method_class
from limbeck.core.teacher import LiveTeacher
from limbeck.models.convnet import ConvNet
from limbeck.synthesis.soft_labels import show
from tests.methods.datasets.recovering import CLASSES, SIDE, info, net

IMAGES = torch.randn(6, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(4))
BATCH = Batch({"image": IMAGES, "index": torch.tensor([5, 0, 3, 1, 4, 2])})


class Silent(LiveTeacher):
    """A teacher that may not be asked."""

    def signal(self, batch, layers=()):
        raise AssertionError("the teacher was asked")


def made(teacher: nn.Module | LiveTeacher | None = None, step: int = 3, seed: int = 11, **options) -> Method:
    kind = method_class("fkd")
    torch.manual_seed(3)
    student = ConvNet(classes=CLASSES, width=3, depth=2, norm="none")
    teacher = teacher if isinstance(teacher, LiveTeacher) else LiveTeacher(teacher or net())
    method = kind(kind.Options(**options), student=student, teacher=teacher, data=info())
    method.clock = Clock(step=step, steps=10, seed=seed)
    return method.train()


def loss_of(method: Method, batch: Batch = BATCH) -> Tensor:
    (update,) = method.step(batch)
    assert update.weight == batch.size
    return update.loss


def log_softmax(row: list[float], warmth: float) -> list[float]:
    total = math.log(sum(math.exp(value / warmth) for value in row))
    return [value / warmth - total for value in row]


@pytest.mark.parametrize("warmth", [1.0, 20.0])
def test_the_loss_is_the_divergence_without_a_factor_of_the_temperature(warmth):
    method = made(temperature=warmth)
    shown = show(IMAGES, method.views(BATCH))
    with torch.no_grad():
        ours, theirs = method.student(shown).tolist(), net().eval()(shown).half().float().tolist()
    expected = 0.0
    for student, teacher in zip(ours, theirs, strict=True):
        log_s, log_t = log_softmax(student, warmth), log_softmax(teacher, warmth)
        expected += sum(math.exp(t) * (t - s) for s, t in zip(log_s, log_t, strict=True)) / len(ours)
    assert float(loss_of(method).detach()) == pytest.approx(expected, rel=1e-3)


def test_both_see_the_same_crops():
    method, seen = made(), []
    for model in (method.teacher.model, method.student):
        model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    loss_of(method)
    theirs, ours = seen
    assert torch.equal(theirs, ours)
    assert torch.equal(ours, show(IMAGES, method.views(BATCH)))
    assert not torch.allclose(ours, IMAGES, atol=0.1)


def test_an_items_crop_is_its_own_whatever_the_batch():
    method = made()
    whole, half = method.views(BATCH), method.views(BATCH.select(slice(2, 5)))
    assert torch.equal(whole.boxes[2:5], half.boxes)
    assert torch.equal(whole.flips[2:5], half.flips)
    assert torch.equal(whole.paste, half.paste)
    method.clock = Clock(step=4, steps=10, seed=12)
    assert not torch.equal(method.views(BATCH).boxes, whole.boxes)


def test_stored_labels_are_read_in_place_of_the_teacher(tmp_path):
    folder = str(tmp_path / "labels")
    live = loss_of(made())
    stored = loss_of(made(labels=folder))
    read = loss_of(made(Silent(net()), labels=folder))
    assert torch.equal(live, stored)
    assert torch.equal(stored, read)
    # Parameters come from the file, not from the seed.
    assert torch.equal(loss_of(made(Silent(net()), seed=99, labels=folder)), read)
    for other in ({"step": 4}, {"seed": 12, "step": 5}):
        with pytest.raises(AssertionError, match="was asked"):
            loss_of(made(Silent(net()), labels=folder, **other))
    with pytest.raises(AssertionError, match="was asked"):
        loss_of(made(Silent(net()), labels=folder), BATCH.select(slice(0, 4)))


def test_the_folder_is_tied_to_its_teacher_and_its_crops(tmp_path):
    folder = str(tmp_path / "labels")
    loss_of(made(labels=folder))
    other = net()
    nn.init.normal_(other.head.weight)
    with pytest.raises(IncompatibleError, match="another teacher"):
        made(other, labels=folder)
    with pytest.raises(IncompatibleError, match="other crops"):
        made(labels=folder, cutmix=0.5)
    made(labels=folder, temperature=3.0)  # which the labels do not depend on


def test_a_student_like_its_teacher_pays_nothing():
    teacher = net().eval()
    kind = method_class("fkd")
    method = kind(kind.Options(temperature=1.0), student=teacher, teacher=LiveTeacher(net()), data=info())
    method.clock = Clock(step=0, steps=1, seed=1)
    assert abs(float(loss_of(method).detach())) < 1e-5  # half precision of the logits
