import math

import pytest
import torch
from tests.oracles.oracle import load

from limbeck.objectives.divergences import divergence, token_cross_entropy
from limbeck.objectives.interpolation import (
    advance_clock,
    interpolated_cross_entropy,
    interpolated_log_probs,
    start_clock,
)
from limbeck.objectives.tokens import reduce_tokens, select_tokens

CASE = load("taid")[0]
SCHEDULES = {
    "paper": {"start": 0.4, "end": 1.0, "speed": 5e-4, "momentum": 0.99},
    "fast": {"start": 0.2, "end": 0.9, "speed": 0.2, "momentum": 0.5},
    "linear": {"start": 0.4, "end": 1.0, "speed": 5e-4, "momentum": 0.99, "adaptive": False},
}
LOSSES = CASE.tensors["sched.losses"]


def run(losses, options, steps=None):
    clock, clocks = start_clock(options["start"]), []
    for step, loss in enumerate(losses):
        clock = advance_clock(clock, loss, step / (steps or len(losses)), **options)
        clocks.append(clock)
    return clocks


@pytest.mark.parametrize("key", sorted(name for name in CASE.tensors if name.startswith("loss.t")))
def test_loss(key):
    student = CASE.tensors["student_logits"].clone().requires_grad_()
    chosen = select_tokens(CASE.tensors["mask"].bool(), student, CASE.tensors["teacher_logits"])
    loss = reduce_tokens(interpolated_cross_entropy(*chosen, float(key.removeprefix("loss.t"))))
    loss.backward()
    CASE.check(key, loss)
    # At t = 0 the recorded gradient is rounding noise around 0.
    CASE.check(key.replace("loss", "grad_student"), student.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule(name):
    clocks = run(LOSSES, SCHEDULES[name])
    CASE.check(f"sched.{name}.t", torch.stack([clock.time for clock in clocks]))
    CASE.check(f"sched.{name}.momentum", torch.stack([clock.momentum for clock in clocks]), atol=1e-7)
    increments = torch.stack([clock.increment for clock in clocks])
    recorded = CASE.tensors[f"sched.{name}.delta"]
    assert recorded[0].isnan()
    assert increments[0].isnan()
    torch.testing.assert_close(increments[1:], recorded[1:], rtol=1e-5, atol=0)


def test_every_recorded_number_is_tested():
    tested = {"student_logits", "teacher_logits", "mask", "sched.losses"}
    tested |= {f"sched.{name}.{what}" for name in SCHEDULES for what in ("t", "momentum", "delta")}
    tested |= {f"{kind}.t{t}" for kind in ("loss", "grad_student") for t in (0.0, 0.4, 0.7, 1.0)}
    assert set(CASE.tensors) == tested


def gradient(loss, student):
    student = student.clone().requires_grad_()
    return torch.autograd.grad(loss(student).sum(), student)[0]


def test_ends_of_the_interpolation():
    student, teacher = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    assert gradient(lambda z: interpolated_cross_entropy(z, teacher, 0.0), student).abs().max() < 1e-12
    torch.testing.assert_close(
        gradient(lambda z: interpolated_cross_entropy(z, teacher, 1.0), student),
        gradient(lambda z: divergence("forward-kl")(z, teacher), student),
    )
    torch.testing.assert_close(interpolated_cross_entropy(student, teacher, 1.0), token_cross_entropy(student, teacher))


def test_gradient_is_student_minus_target():
    student, teacher = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    target = ((1 - 0.3) * student + 0.3 * teacher).softmax(-1)
    time = torch.tensor(0.3, dtype=torch.float64)
    got = gradient(lambda z: interpolated_cross_entropy(z, teacher, time), student)
    torch.testing.assert_close(got, student.softmax(-1) - target)


@pytest.mark.parametrize("time", [0.0, 0.5, 1.0])
def test_absent_entries(time):
    student = torch.tensor([0.1, 0.5, -math.inf, -0.2], requires_grad=True)
    teacher = torch.tensor([0.3, -math.inf, 0.4, 0.2])
    target = interpolated_log_probs(student, teacher, time).exp()
    assert target.sum() == pytest.approx(1)
    assert (target == 0).tolist() == [False, time > 0, time < 1, False]
    interpolated_cross_entropy(student, teacher, time).backward()
    assert student.grad.isfinite().all()


def test_padded_vocabulary():
    student, teacher = torch.randn(2, 5), torch.randn(2, 7)
    shared = torch.cat([teacher[:, :5], torch.full((2, 2), -math.inf)], dim=-1)
    torch.testing.assert_close(
        interpolated_cross_entropy(student, teacher, 0.5), interpolated_cross_entropy(student, shared, 0.5)
    )


@pytest.mark.parametrize("name", ["paper", "fast"])
def test_clock_is_monotone_and_never_behind_the_linear_one(name):
    losses = 2 + torch.randn(50, generator=torch.Generator().manual_seed(0)).abs()
    times = torch.stack([clock.time for clock in run(losses, SCHEDULES[name])])
    linear = torch.stack([clock.time for clock in run(losses, {**SCHEDULES[name], "adaptive": False})])
    assert (times.diff() >= 0).all()
    assert (times >= linear).all()
    assert (times <= SCHEDULES[name]["end"]).all()


def test_falling_loss_is_faster():
    falling, rising = torch.linspace(3, 1, 20), torch.linspace(1, 3, 20)
    options = {**SCHEDULES["fast"], "speed": 0.05}
    assert run(falling, options, 10**6)[-1].time > run(rising, options, 10**6)[-1].time


def test_update_is_pure_and_without_graph():
    clock = start_clock()
    loss = torch.tensor(2.0, requires_grad=True) * 1
    later = advance_clock(advance_clock(clock, loss, 0.0), loss, 0.5)
    assert clock.previous_loss.isnan()
    assert not later.time.requires_grad
    assert later.time == pytest.approx(0.7)
