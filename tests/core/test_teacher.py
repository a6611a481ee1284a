import copy

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo, Method
from limbeck.core.options import OptionsBase
from limbeck.core.teacher import Ensemble, LiveTeacher, Renormalise, Teacher, TeacherSignal


def net(seed: int = 0) -> nn.Module:
    """A small classifier of 2-channel images, with batch norm and dropout, which behave otherwise in train mode."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 4, 3)
    )


BATCH = Batch({"image": torch.rand(5, 2, 4, 4, generator=torch.Generator().manual_seed(1)), "index": torch.arange(5)})


class Fixed:
    """A teacher with given logits."""

    def __init__(self, logits: Tensor | None, name: str = "fixed") -> None:
        self.logits, self.fingerprint, self.device = logits, name, None

    def signal(self, batch: Batch, layers=()) -> TeacherSignal:
        return TeacherSignal(self.logits, {layer: torch.zeros(1) for layer in layers})

    def to(self, device) -> None:
        self.device = device


def test_a_live_teacher_is_frozen_in_eval_mode_and_records_nothing():
    model = net().train()
    teacher = LiveTeacher(model)
    assert isinstance(teacher, Teacher)
    before = copy.deepcopy(model.state_dict())
    for _ in range(3):
        signal = teacher.signal(BATCH, ["2"])
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not signal.logits.requires_grad
    assert not signal.features["2"].requires_grad
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    torch.testing.assert_close(signal.logits, model(BATCH.image))


def test_its_signal_can_be_saved_for_a_students_backward_pass():
    weight = torch.ones(3, requires_grad=True)
    (weight * LiveTeacher(net()).signal(BATCH).logits).sum().backward()
    assert weight.grad is not None


def test_features_come_in_the_order_asked_for():
    model = net()
    signal = LiveTeacher(model).signal(BATCH, ["2", "0"])
    assert list(signal.features) == ["2", "0"]
    torch.testing.assert_close(signal.features["0"], model[0](BATCH.image))
    with pytest.raises(IncompatibleError, match="no layer '9'"):
        LiveTeacher(model).signal(BATCH, ["9"])


def test_a_teacher_of_features_alone_ends_its_pass_early():
    model = net()
    model[-1].register_forward_hook(lambda *_: pytest.fail("the head ran"))
    signal = LiveTeacher(model, until_layers=True).signal(BATCH, ["0", "2"])
    assert signal.logits is None
    assert list(signal.features) == ["0", "2"]


def test_a_method_keeps_its_teacher_out_of_everything_that_is_trained_or_saved():
    class Watching(Method):
        """Has a student and a teacher."""

    teacher = LiveTeacher(net())
    method = Watching(OptionsBase(), student=nn.Linear(2, 2), teacher=teacher, data=DataInfo(5, 3, BATCH))
    assert set(method.state_dict()) == {"student.weight", "student.bias"}
    assert len(list(method.parameters())) == 2
    method.train()
    assert not any(module.training for module in teacher.model.modules())


def test_renormalising_equals_normalising_raw_images_for_the_teacher():
    raw = torch.rand(5, 2, 4, 4)
    ours, theirs = ([0.2, 0.4], [0.3, 0.5]), ([0.485, 0.1], [0.229, 0.9])

    def normalised(mean, std):
        return (raw - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)

    given = Batch({"image": normalised(*ours), "label": torch.arange(5)})
    adapted = Renormalise(ours, theirs)(given)
    torch.testing.assert_close(adapted.image, normalised(*theirs), rtol=1e-5, atol=1e-6)
    assert torch.equal(adapted.label, given.label)
    model = net()
    torch.testing.assert_close(
        LiveTeacher(model, adapt=Renormalise(ours, theirs)).signal(given).logits,
        LiveTeacher(model).signal(Batch({"image": normalised(*theirs)})).logits,
        rtol=1e-4,
        atol=1e-5,
    )


def test_renormalising_keeps_the_precision_of_the_images():
    half = Batch({"image": torch.rand(2, 1, 4, 4, dtype=torch.float64)})
    assert Renormalise(([0.5], [0.5]), ([0.1], [0.2]))(half).image.dtype == torch.float64


def test_the_fingerprint_is_that_of_the_weights():
    same, other = LiveTeacher(net()).fingerprint, LiveTeacher(net(1)).fingerprint
    assert same == LiveTeacher(net()).fingerprint
    assert same != other
    for change in ("0.weight", "1.running_mean", "1.num_batches_tracked"):
        model = net()
        with torch.no_grad():
            value = model.state_dict()[change].view(-1)
            value[0] = torch.nextafter(value[0], value[0] + 1) if value.is_floating_point() else value[0] + 1
        assert LiveTeacher(model).fingerprint != same, change
    doubled = net().double()
    assert LiveTeacher(doubled).fingerprint != same


def test_mean_prob_averages_probabilities_and_not_logits():
    logits = [torch.tensor([[4.0, 0.0, -1.0]]), torch.tensor([[0.0, 1.0, 3.0]])]
    combined = Ensemble([Fixed(value) for value in logits]).signal(BATCH).logits
    mean = sum(value.softmax(-1) for value in logits) / 2
    torch.testing.assert_close(combined.softmax(-1), mean)
    torch.testing.assert_close(combined.exp().sum(-1), torch.ones(1))
    assert not torch.allclose(mean, (sum(logits) / 2).softmax(-1), atol=0.05)


def test_one_teacher_alone_keeps_its_probabilities():
    logits = torch.randn(4, 3)
    torch.testing.assert_close(Ensemble([Fixed(logits)]).signal(BATCH).logits, logits.log_softmax(-1))


def test_weights_are_normalised_and_may_silence_a_teacher():
    logits = [torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 3)]
    teachers = [Fixed(value) for value in logits]
    combined = Ensemble(teachers, "weighted", [3.0, 1.0, 0.0]).signal(BATCH).logits
    expected = 0.75 * logits[0].softmax(-1) + 0.25 * logits[1].softmax(-1)
    torch.testing.assert_close(combined.softmax(-1), expected)


def test_random_lets_one_teacher_speak_for_the_whole_batch():
    teachers = [Fixed(torch.full((5, 3), float(value))) for value in range(3)]
    ensemble = Ensemble(teachers, "random")
    torch.manual_seed(0)
    spoken = [ensemble.signal(BATCH, ["a"]) for _ in range(60)]
    counts = [sum(bool((signal.logits == value).all()) for signal in spoken) for value in range(3)]
    assert sum(counts) == 60
    assert min(counts) > 8
    assert set(spoken[0].features) == {"a"}
    torch.manual_seed(0)
    assert [signal.logits[0, 0] for signal in spoken] == [ensemble.signal(BATCH).logits[0, 0] for _ in range(60)]


def test_ensembles_that_cannot_be_are_refused():
    with pytest.raises(IncompatibleError, match="at least one"):
        Ensemble([])
    for reduce, weights in (("weighted", None), ("mean_prob", [1.0]), ("weighted", [1.0, 2.0])):
        with pytest.raises(IncompatibleError, match="one weight a teacher"):
            Ensemble([Fixed(torch.zeros(1, 3))], reduce, weights)
    with pytest.raises(IncompatibleError, match="cannot be averaged"):
        Ensemble([Fixed(torch.zeros(1, 3))]).signal(BATCH, ["a"])
    with pytest.raises(IncompatibleError, match="no logits"):
        Ensemble([Fixed(None)]).signal(BATCH)


def test_an_ensembles_fingerprint_says_how_it_is_combined():
    one, two = Fixed(None, "one"), Fixed(None, "two")
    prints = [
        Ensemble([one, two]), Ensemble([two, one]), Ensemble([one]), Ensemble([one, two], "random"),
        Ensemble([one, two], "weighted", [1, 2]),
    ]  # fmt: skip
    assert len({ensemble.fingerprint for ensemble in prints}) == len(prints)
    assert Ensemble([one, two]).fingerprint == prints[0].fingerprint


def test_an_ensemble_moves_every_teacher():
    teachers = [Fixed(None), Fixed(None)]
    Ensemble(teachers).to(torch.device("meta"))
    assert [teacher.device for teacher in teachers] == [torch.device("meta")] * 2
