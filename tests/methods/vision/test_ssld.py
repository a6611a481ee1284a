import copy
import math

import pytest
import torch

import limbeck
from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.core.specs import DataSpec
from limbeck.core.teacher import LiveTeacher
from limbeck.data.join import JoinedSource
from limbeck.data.open import DataSplit, open_data
from limbeck.data.selection import mine
from limbeck.methods.vision.ssld import _COMPARED
from limbeck.models.convnet import ConvNet
from limbeck.models.mlp import MLP
from tests.methods.classic.rig import batch, both, build, check_gradients, teacher_net, update_of
from tests.oracles.oracle import load

CASES = {case.name: case for case in load("ssld")}
NAMES = {"ssld_js": "symmetric-kl", "dml": "symmetric-kl", "soft_ce": "soft-ce"}


@pytest.mark.parametrize("name", NAMES)
def test_against_the_original_code(name):
    case = CASES[name]
    student, teacher = case.inputs["zs"].clone().requires_grad_(), case.inputs["zt"].clone().requires_grad_()
    loss = _COMPARED[NAMES[name]](student, teacher).mean()
    loss.backward()
    case.check("loss", loss[None])
    case.check("grad_zs", student.grad, of_largest=True)
    assert teacher.grad is None


def test_every_case_is_compared():
    assert CASES.keys() == NAMES.keys()


@pytest.mark.parametrize("name", ["symmetric-kl", "jensen-shannon", "soft-ce"])
def test_the_loss_is_the_divergence_of_the_logits(name):
    method = build("ssld", divergence=name)
    _, ours, _, theirs = both(method)
    p, q = theirs.double().softmax(1), ours.double().softmax(1)
    m = (p + q) / 2

    def kl(one, other):
        return (one * (one / other).log()).sum(1).mean()

    expected = {
        "symmetric-kl": (kl(p, q) + kl(q, p)) / 2,
        "jensen-shannon": (kl(p, m) + kl(q, m)) / 2,
        "soft-ce": -(p * q.log()).sum(1).mean(),
    }[name]
    torch.testing.assert_close(update_of(method).loss.double(), expected, rtol=1e-4, atol=1e-6)
    check_gradients(method)


def test_the_default_is_the_code_s_symmetric_kl_on_the_whole_student():
    options = build("ssld").options
    assert (options.divergence, options.layers) == ("symmetric-kl", [])


def test_the_loss_is_symmetric_zero_at_equality_and_blind_to_shifts():
    loss = _COMPARED["symmetric-kl"]
    one, other = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).unbind(0)
    torch.testing.assert_close(loss(one, other), loss(other, one))
    assert float(loss(one, one).abs().max()) < 1e-6
    torch.testing.assert_close(loss(one + 3.0, other - 1.0), loss(one, other), rtol=1e-4, atol=1e-6)


def test_the_gradient_has_the_closed_form():
    draws = torch.Generator().manual_seed(1)
    student = torch.randn(4, 6, generator=draws, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 6, generator=draws, dtype=torch.float64)
    _COMPARED["symmetric-kl"](student, teacher).mean().backward()
    q, p = student.detach().softmax(1), teacher.softmax(1)
    ratio = (q / p).log()
    expected = 0.5 * ((q - p) + q * (ratio - (q * ratio).sum(1, keepdim=True))) / 4
    torch.testing.assert_close(student.grad, expected)


def test_the_divergence_proper_is_bounded():
    sure = 50 * torch.eye(3)
    loss = _COMPARED["jensen-shannon"](sure, sure.roll(1, 0))
    torch.testing.assert_close(loss, torch.full((3,), math.log(2)))
    assert float(_COMPARED["symmetric-kl"](sure, sure.roll(1, 0)).min()) > 40


class NoLabels(Batch):
    """A batch that raises where a label is asked for."""

    def __getitem__(self, name):
        assert name != "label", "a label was read"
        return super().__getitem__(name)

    def __getattr__(self, name):
        assert name != "label", "a label was read"
        return super().__getattr__(name)


def test_labels_are_never_read():
    given = batch()
    with pytest.raises(AssertionError, match="a label was read"):
        next(build("kd").step(NoLabels(given)))
    (update,) = build("ssld").step(NoLabels(given))
    torch.testing.assert_close(update.loss, update_of(build("ssld"), Batch({"image": given.image})).loss)


def test_a_teacher_of_other_classes_is_refused():
    with pytest.raises(IncompatibleError, match="the student has 10 classes and the teacher 7 classes"):
        update_of(build("ssld", teacher=teacher_net(classes=7)))


def test_named_layers_alone_are_trained_and_the_rest_stands_still():
    student = ConvNet(width=4, depth=3, norm="batch")
    method = build("ssld", student=student, layers=["head"])
    before = copy.deepcopy(student.state_dict())
    assert student.head.training
    assert not any(module.training for module in student.stages.modules())
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        update_of(method.train()).loss.backward()
        optimizer.step()
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"head.weight", "head.bias"}
    assert not method.eval().student.head.training
    with pytest.raises(IncompatibleError, match="no layer 'tail'"):
        build("ssld", layers=["tail"])


def test_the_three_stages_follow_each_other(tmp_path):
    """Mined and base images without labels, then the base alone at a low rate, then the head alone."""
    torch.manual_seed(0)
    data = open_data(DataSpec(limit=300))
    teacher = LiveTeacher(ConvNet(width=4))
    base, pool = data.train.select(torch.arange(40)), data.train.select(torch.arange(40, 300))
    mined = mine(pool, data.validation, teacher, 5, cosine=0.98)
    union = JoinedSource([base, mined.source], torch.full((40 + len(mined.rows),), -100))
    student, settings = MLP(width=8), {"teacher": teacher.model, "steps": 2, "quiet": True}
    spec = {"batch_size": 8, "optimizer": {"lr": 0.01, "lr_multipliers": {"stages.0": 0.1}}}
    limbeck.distill(
        "ssld", student=student, data=DataSplit(union, data.validation), out=tmp_path / "1", **settings, **spec
    )
    weights = copy.deepcopy(student.state_dict())
    spec = {"batch_size": 8, "optimizer": {"lr": 0.0001}}
    limbeck.distill(
        "ssld", student=student, data=DataSplit(base, data.validation), out=tmp_path / "2", **settings, **spec
    )
    tuned = copy.deepcopy(student.state_dict())
    fixed = {"options": {"layers": ["head"]}, "out": tmp_path / "3", **settings, **spec}
    limbeck.distill("ssld", student=student, data=DataSplit(base, data.validation), **fixed)
    assert all(not torch.equal(weights[name], tuned[name]) for name in tuned)
    final = limbeck.load(tmp_path / "3").state_dict()
    assert {name for name in final if not torch.equal(final[name], tuned[name])} == {"head.weight", "head.bias"}
