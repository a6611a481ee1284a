import math

import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.checkpoint import Checkpoints
from limbeck.core.method import DataInfo, Update
from limbeck.core.specs import TrainSpec
from limbeck.core.teacher import LiveTeacher
from limbeck.core.trainer import Trainer
from limbeck.methods.language.taid import TAID
from limbeck.objectives.divergences import divergence
from tests.methods.language.rig import Headless, both, build, check_gradients, gpt2, llama, trainer, update_of
from tests.oracles.oracle import load

CASE = load("taid")[0]
SCHEDULES = {
    "paper": {"start": 0.4, "end": 1.0, "speed": 5e-4, "momentum": 0.99},
    "fast": {"start": 0.2, "end": 0.9, "speed": 0.2, "momentum": 0.5},
    "linear": {"start": 0.4, "end": 1.0, "speed": 5e-4, "momentum": 0.99, "adaptive": False},
}
LOSSES = CASE.tensors["sched.losses"]


class Fixed(nn.Module):
    """Says the recorded logits, whatever it is asked."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, input_ids, attention_mask=None):
        return torch.cat([self.logits, torch.zeros_like(self.logits[:, :1])], 1)[: len(input_ids)]


def recorded_batch():
    """Labels at the recorded tokens: one further on than the logits that predict them."""
    labels = torch.full((2, 6), -100)
    labels[:, 1:][CASE.tensors["mask"].bool()] = 3
    return Batch({"input_ids": torch.zeros(2, 6, dtype=torch.long), "labels": labels})


def recorded(**options):
    teacher = LiveTeacher(Fixed(CASE.tensors["teacher_logits"]))
    info = DataInfo(2, 0, recorded_batch())
    return TAID(TAID.Options(**options), student=Fixed(CASE.tensors["student_logits"]), teacher=teacher, data=info)


@pytest.mark.parametrize("time", [0.0, 0.4, 0.7, 1.0])
def test_loss_and_gradient_are_the_recorded_ones(time):
    method = recorded(start=time)
    (update,) = method.step(recorded_batch())
    CASE.check(f"loss.t{time}", update.loss)
    CASE.check(f"loss.t{time}", update.logs["divergence"])
    (gradient,) = torch.autograd.grad(update.loss, method.student.logits)
    CASE.check(f"grad_student.t{time}", gradient, rtol=0, atol=1e-6)


class Scripted(TAID):
    """Its losses are the recorded ones."""

    def step(self, batch):
        nothing = self.student.logits.sum() * 0
        yield Update("student", nothing, 1, {"divergence": LOSSES[self.clock.step]})

    def after_update(self, player, logs):
        super().after_update(player, logs)
        self.__dict__.setdefault("seen", []).append((self.time.item(), self.momentum.item(), self.increment.item()))


class Same:
    def steps(self, start, stop):
        return iter([[recorded_batch()]] * (stop - start))


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_trainer_moves_the_clock_as_recorded(name):
    teacher, info = LiveTeacher(Fixed(CASE.tensors["teacher_logits"])), DataInfo(2, 0, recorded_batch())
    student = Fixed(CASE.tensors["student_logits"])
    method = Scripted(TAID.Options(**SCHEDULES[name]), student=student, teacher=teacher, data=info)
    Trainer(method, Same(), TrainSpec(steps=20, batch_size=2), steps=20, items=2, seed=0).fit()
    times, momenta, increments = map(torch.tensor, zip(*method.seen, strict=True))
    CASE.check(f"sched.{name}.t", times)
    CASE.check(f"sched.{name}.momentum", momenta, atol=1e-7)
    torch.testing.assert_close(increments[1:], CASE.tensors[f"sched.{name}.delta"][1:], rtol=1e-5, atol=0)
    assert math.isnan(increments[0])
    assert (times.diff() >= 0).all()


@pytest.mark.parametrize("student", [gpt2, lambda: Headless(gpt2())])
def test_at_time_0_nothing_pulls(student):
    method = build("taid", start=0.0, student=student())
    gradients = torch.autograd.grad(update_of(method).loss, list(method.student.parameters()))
    assert max(gradient.abs().max() for gradient in gradients) < 1e-6


@pytest.mark.parametrize("student", [gpt2, lambda: Headless(gpt2())])
def test_at_time_1_it_is_forward_kl(student):
    method = build("taid", start=1.0, student=student())
    parameters = list(method.student.parameters())
    ours, theirs = both(method)
    expected = torch.autograd.grad(divergence("forward-kl")(ours, theirs).mean(), parameters)
    for gradient, wanted in zip(torch.autograd.grad(update_of(method).loss, parameters), expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


def test_the_clock_moves_by_the_interpolated_loss_alone():
    methods = [build("taid", label_weight=label_weight, weight=0.5) for label_weight in (0.0, 2.0)]
    plain, labelled = (update_of(method) for method in methods)
    assert labelled.loss > plain.loss + 1
    torch.testing.assert_close(labelled.logs["divergence"], plain.logs["divergence"])
    torch.testing.assert_close(plain.loss, 0.5 * plain.logs["divergence"])
    for method, update in zip(methods, (plain, labelled), strict=True):
        method.after_update("student", {"loss": update.loss, **update.logs})
        method.after_update(
            "student", {"loss": update.loss, **update.logs, "divergence": update.logs["divergence"] / 2}
        )
    assert torch.equal(methods[0].momentum, methods[1].momentum)
    assert methods[0].momentum == pytest.approx(0.01 * 0.5)
    check_gradients(methods[1], labelled.loss)


def test_a_step_moves_time_and_a_checkpoint_keeps_it(tmp_path):
    method = build("taid", start=0.1, speed=0.5)
    trainer(method, steps=4, checkpoints=Checkpoints(tmp_path)).fit()
    assert 0.4 < method.time <= 1
    saved = Checkpoints(tmp_path).load().tensors["method"]
    assert torch.equal(saved["time"], method.time)
    assert saved["previous_loss"].isfinite()


def test_the_target_stops_at_its_end():
    method = build("taid", start=0.3, end=0.5, speed=1.0, teacher=llama(seed=9))
    trainer(method, steps=6).fit()
    assert method.time == pytest.approx(0.5)
    with pytest.raises(ValueError, match="end must not lie before start"):
        build("taid", start=0.6, end=0.5)
