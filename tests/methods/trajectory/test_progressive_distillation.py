import copy

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import Clock, DataInfo
from limbeck.core.specs import OptimizerSpec, TrainSpec
from limbeck.core.teacher import LiveTeacher
from limbeck.core.trainer import Trainer
from limbeck.data.noise import ItemNoise
from limbeck.diffusion.denoiser import NetworkDenoiser, Process, Sampling, note_process, process_of
from limbeck.diffusion.embeddings import scalar_embedding
from limbeck.diffusion.generation import generate
from limbeck.diffusion.mixture import GaussianMixtureDenoiser
from limbeck.diffusion.parameterisations import Direct, Preconditioned
from limbeck.diffusion.predictions import Prediction
from limbeck.diffusion.progressive import jumps, nested_times, two_step_target, weighted_error
from limbeck.diffusion.schedules import EDM, Cosine, FlowMatching
from limbeck.methods.trajectory.progressive_distillation import ProgressiveDistillation
from limbeck.models.denoising_mlp import DenoisingMLP
from tests.oracles.oracle import load


class Affine(nn.Module):
    """The oracle's network: a x + b c."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))

    def forward(self, x, time, condition):
        return self.a * x + self.b * time.view(-1, *[1] * (x.ndim - 1))


def edm(network, steps=4):
    process = Process(EDM(), Preconditioned(0.5, noise="250-log"), Sampling("ddim", steps))
    return note_process(network, process)


def batch(items=6, numbers=4, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return Batch(
        {
            "image": torch.rand(items, 1, 2, numbers // 2, generator=draws) * 2 - 1,
            "label": torch.arange(items) % 3,
            "index": torch.arange(items),
        }
    )


def network(seed=0, width=16, guidance=False):
    torch.manual_seed(seed)
    return DenoisingMLP(numbers=4, classes=3, width=width, depth=1, guidance=guidance)


def teacher(schedule=None, width=16):
    process = Process(schedule or Cosine(), Direct("v"), Sampling("ddim", 8, 2.0), null_label=3)
    return note_process(network(7, width), process)


def made(student=None, parent=None, clock=None, **options):
    options = {"start_steps": 4, "end_steps": 1} | options
    method = ProgressiveDistillation(
        ProgressiveDistillation.Options(**options),
        student=network() if student is None else student,
        teacher=LiveTeacher(teacher() if parent is None else parent),
        data=DataInfo(items=6, classes=3, example=batch(2)),
    )
    method.clock = clock or Clock(0, 100, seed=5)
    return method


def trainer(method, steps, rows=None, **spec):
    spec = {"optimizer": OptimizerSpec(lr=1e-2, schedule="constant"), "log_every": 1} | spec

    class Same:
        def steps(self, start, stop):
            return iter([[batch(seed=step)] for step in range(start, stop)])

    rows = [] if rows is None else rows
    return Trainer(method, Same(), TrainSpec(steps=steps, **spec), steps=steps, items=6, seed=0, record=rows.append)


def test_oracle_of_the_loss_and_its_gradients():
    case = load("guided-distillation")[0]
    x0, noise, index = (case.inputs[name] for name in ("x0", "noise", "idx"))
    student, parent = edm(Affine(0.7, 0.05)), edm(Affine(0.5, 0.01))
    denoiser = NetworkDenoiser(student)
    t, between, s = jumps(denoiser.schedule, 4)[index.long().reshape(-1)].unbind(1)
    x_t = denoiser.schedule.add_noise(x0, noise, t)
    with torch.no_grad():
        target = two_step_target(NetworkDenoiser(parent), x_t, t, between, s)
    loss = weighted_error(denoiser(x_t, t), target)
    case.check("pd_loss", loss)
    a, b = torch.autograd.grad(loss.mean(), [student.a, student.b])
    case.check("pd_grad_a", a)
    case.check("pd_grad_b", b)


def test_oracle_through_the_method(monkeypatch):
    """The very step of the method, with the oracle's draws."""
    case = load("guided-distillation")[0]
    monkeypatch.setattr(ItemNoise, "integers", lambda self, key, high: case.inputs["idx"].long().reshape(-1))
    monkeypatch.setattr(ItemNoise, "normal", lambda self, key, like: case.inputs["noise"])
    student, parent = edm(Affine(0.7, 0.05)), edm(Affine(0.5, 0.01))
    given = Batch({"image": case.inputs["x0"], "index": torch.arange(4)})
    method = ProgressiveDistillation(
        ProgressiveDistillation.Options(start_steps=4, end_steps=4, initialise="none"),
        student=student,
        teacher=LiveTeacher(parent),
        data=DataInfo(items=4, classes=0, example=given),
    )
    method.clock = Clock(0, 10)
    update = next(method.step(given))
    torch.testing.assert_close(update.loss, case.outputs["pd_loss"].mean(), rtol=1e-5, atol=0)
    update.loss.backward()
    case.check("pd_grad_a", student.a.grad)
    case.check("pd_grad_b", student.b.grad)


@pytest.mark.parametrize("dim", [512, 33])
def test_oracle_of_the_embedding(dim):
    case = load("guided-distillation")[0]
    case.check(f"w_emb_{dim}", scalar_embedding(case.inputs["w"].float(), dim), atol=1e-3)


def test_the_loss_of_a_batch_by_hand():
    """Plain Python on one number an item: two DDIM steps of the teacher, and one of the student to the same place."""
    import math

    method = made(start_steps=2, end_steps=2)
    given = batch()
    loss = next(method.step(given)).loss
    draws = method.draws(given)
    rows = draws.integers("jump", 2).tolist()
    noise = draws.normal("noise", given.image)
    top, total, count = 2 / math.pi * math.atan(math.exp(10)), 0.0, 0

    def coefficients(t):
        return math.cos(math.pi / 2 * t), math.sin(math.pi / 2 * t)

    def x0(model, z, t, n):
        with torch.no_grad():
            v = model(torch.tensor(z).float()[None], torch.tensor([t]).float(), {"label": given.label[n : n + 1]})
        alpha, sigma = coefficients(t)
        return [alpha * number - sigma * float(part) for number, part in zip(z, v[0], strict=True)]

    def ddim(model, z, t, s, n):
        (alpha, sigma), (alpha_s, sigma_s) = coefficients(t), coefficients(s)
        data = x0(model, z, t, n)
        return [alpha_s * d + sigma_s * (number - alpha * d) / sigma for d, number in zip(data, z, strict=True)]

    for n, row in enumerate(rows):
        t, middle, s = top * (1 - row / 2), top * (1 - row / 2 - 0.25), top * (1 - row / 2 - 0.5)
        (alpha, sigma), (alpha_s, sigma_s) = coefficients(t), coefficients(s)
        clean, eps = given.image[n].flatten().tolist(), noise[n].flatten().tolist()
        z = [alpha * a + sigma * b for a, b in zip(clean, eps, strict=True)]
        landing = ddim(method.teacher.model, ddim(method.teacher.model, z, t, middle, n), middle, s, n)
        ratio = sigma_s / sigma
        target = [(a - ratio * b) / (alpha_s - ratio * alpha) for a, b in zip(landing, z, strict=True)]
        weight = max(alpha**2 / sigma**2, 1)
        for guess, right in zip(x0(method.student, z, t, n), target, strict=True):
            total, count = total + weight * (guess - right) ** 2, count + 1
    assert float(loss.detach()) == pytest.approx(total / count, rel=1e-4)


class Knowing(nn.Module):
    """A network whose x0 is the same everywhere."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x, time, condition):
        return self.value.expand_as(x)


@pytest.mark.parametrize("schedule", [Cosine(), FlowMatching(), EDM()], ids=lambda s: type(s).__name__)
def test_nothing_is_left_to_learn_from_a_constant_prediction(schedule):
    process = Process(schedule, Direct("x0"), Sampling("ddim", 8))
    student, parent = (note_process(Knowing(0.4), process) for _ in range(2))
    method = made(student, parent, start_steps=8)
    assert next(method.step(batch())).loss < 1e-7
    student.value.data += 0.1
    assert next(method.step(batch())).loss > 1e-3


def test_the_student_starts_from_the_teachers_weights_or_from_its_own():
    parent = teacher()
    method = made(parent=parent)
    assert all(torch.equal(value, parent.state_dict()[name]) for name, value in method.student.state_dict().items())
    own = network()
    before = copy.deepcopy(own.state_dict())
    method = made(own, parent, initialise="none")
    assert all(torch.equal(value, before[name]) for name, value in method.student.state_dict().items())
    with pytest.raises(IncompatibleError, match="cannot start from the teacher"):
        made(parent=teacher(width=24))
    made(parent=teacher(width=24), initialise="none")


def test_the_student_becomes_the_teacher_at_each_halving():
    method, rows = made(), []
    run = trainer(method, 10, rows)  # halvings to 4, 2, 1 of lengths 1, 2, 2: steps 0, 2, 6
    students = []
    for step in range(10):
        students.append({name: value.clone() for name, value in method.student.state_dict().items()})
        run.train_step([batch(seed=step)])
        run.step += 1
        begun = max(start for start in (0, 2, 6) if start <= step)
        held = method.previous.state_dict()
        assert all(torch.equal(held[name], value) for name, value in students[begun].items()), step
        assert process_of(method.student).sampling.steps == {0: 4, 2: 2, 6: 1}[begun]
        assert int(method.phase) == [0, 2, 6].index(begun)
    assert not list(method.previous.parameters())
    assert list(method.players()) == ["student"]


def test_only_the_first_phase_asks_the_teacher(monkeypatch):
    method, asked = made(), []
    ask = method.ask
    monkeypatch.setattr(method, "ask", lambda *given: asked.append(method.clock.step) or ask(*given))
    trainer(method, 5).fit()
    assert set(asked) == {0}


def test_later_phases_learn_from_the_copy():
    method = made(start_steps=2, clock=Clock(0, 4, seed=5))
    with torch.no_grad():  # the student has left the teacher behind, and is copied at step 2
        method.student.exit.weight.add_(0.3)
    method.clock = Clock(2, 4, seed=5)
    given = batch()
    loss = next(method.step(given)).loss
    x0, condition = method.read(given)
    draws, denoiser = method.draws(given), method.denoiser
    t, between, s = jumps(Cosine(), 1)[draws.integers("jump", 1)].unbind(1)
    x_t = Cosine().add_noise(x0, draws.normal("noise", x0), t)
    with torch.no_grad():
        target = two_step_target(lambda x, time: denoiser(x, time, condition), x_t, t, between, s)
    torch.testing.assert_close(loss, weighted_error(denoiser(x_t, t, condition), target).mean())


@pytest.mark.filterwarnings("ignore:the loss is not finite")
def test_a_skipped_update_at_a_halving_does_not_lose_the_copy():
    method = made(start_steps=2)
    run = trainer(method, 8, non_finite="skip")
    for step in range(8):
        if step == 4:
            student = copy.deepcopy(method.student.state_dict())
        given = batch(seed=step)
        if step in (4, 5):  # the halving comes at step 4
            given["image"][:] = torch.nan
        run.train_step([given])
        run.step += 1
    assert int(method.phase) == 1
    assert all(torch.equal(method.previous.state_dict()[name], value) for name, value in student.items())


def test_too_short_a_training_is_refused():
    method = made(clock=Clock(0, 2))
    with pytest.raises(IncompatibleError, match="too few for 3 phases"):
        next(method.step(batch()))


def test_the_copy_teaches_in_eval_mode():
    method = made()
    method.train()
    assert method.student.training
    assert not any(module.training for module in method.previous.modules())


@pytest.mark.parametrize("schedule", [Cosine(), EDM()], ids=lambda s: type(s).__name__)
def test_the_result_is_sampled_on_the_grid_that_it_was_trained_on(schedule):
    direct = Preconditioned() if isinstance(schedule, EDM) else Direct("v")
    parent = note_process(network(), Process(schedule, direct, Sampling("ddim", 8, 3.0), null_label=3))
    method = made(parent=parent, start_steps=4, end_steps=4)
    sampling = process_of(method.student).sampling
    torch.testing.assert_close(sampling.times_for(schedule), nested_times(schedule, 4))
    assert (sampling.solver, sampling.steps, sampling.guidance) == ("ddim", 4, 1.0)


def test_the_first_teacher_can_be_guided():
    guided, plain = (made(start_steps=2, end_steps=2, guidance=scale) for scale in (4.0, 1.0))
    given = batch()
    x0, condition = plain.read(given)
    t = torch.full((6,), 0.5).double()
    asked = guided.ask(x0, t, condition, 4.0).v
    parent = NetworkDenoiser(guided.teacher.model)
    with torch.no_grad():
        with_label = parent(x0, t, condition).v
        without = parent(x0, t, parent.null(condition)).v
    torch.testing.assert_close(asked, without + 4 * (with_label - without))
    losses = [float(next(method.step(given)).loss.detach()) for method in (guided, plain)]
    assert losses[0] != pytest.approx(losses[1], rel=0.1)


def test_what_does_not_fit_is_refused():
    parent = teacher()
    with pytest.raises(IncompatibleError, match="different noise schedules"):
        made(note_process(network(), Process(FlowMatching(), Direct("velocity"))), parent)
    with pytest.raises(IncompatibleError, match="predicts something else"):
        made(note_process(network(), Process(Cosine(), Direct("x0"))), parent)
    with pytest.raises(ValidationError, match="does not lead"):
        ProgressiveDistillation.Options(start_steps=12, end_steps=1)
    with pytest.raises(ValidationError, match="phase_lengths names 2"):
        ProgressiveDistillation.Options(start_steps=4, end_steps=1, phase_lengths=[1.0, 2.0])


def test_halving_an_exact_teacher_brings_the_student_close_to_its_many_steps():
    torch.manual_seed(0)
    mixture = GaussianMixtureDenoiser.ring(Cosine(), modes=2, std=0.3)
    student = DenoisingMLP(numbers=2, width=48, depth=1)
    note_process(student, Process(Cosine(), Direct("v")))
    data = mixture.draw(2048)

    class Points:
        def steps(self, start, stop):
            for step in range(start, stop):
                rows = torch.arange(step * 128, step * 128 + 128) % 2048
                yield [Batch({"image": data[rows], "index": rows})]

    method = ProgressiveDistillation(
        ProgressiveDistillation.Options(start_steps=8, end_steps=2, initialise="none"),
        student=student,
        teacher=LiveTeacher(mixture),
        data=DataInfo(items=2048, classes=0, example=Batch({"image": data[:2], "index": torch.arange(2)})),
    )
    spec = TrainSpec(steps=200, optimizer=OptimizerSpec(lr=3e-3), ema=0.98)
    result = Trainer(method, Points(), spec, steps=200, items=2048, seed=0).fit()
    noise = torch.randn(500, 2)
    with torch.no_grad():
        endpoint = generate(mixture, noise, steps=64)
        ours = (generate(NetworkDenoiser(result), noise) - endpoint).square().mean()
        theirs = (generate(mixture, noise, steps=2) - endpoint).square().mean()
    assert ours < 0.5 * theirs


def test_a_network_of_diffusers_is_halved():
    diffusers = pytest.importorskip("diffusers")
    from limbeck.diffusion.schedules import VPDiscrete

    def unet():
        return diffusers.UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        )

    torch.manual_seed(0)
    parent = note_process(unet(), Process(VPDiscrete.named("linear"), Direct("v"), Sampling("ddim", 20)))
    images = torch.randn(4, 1, 8, 8)
    given = Batch({"image": images, "index": torch.arange(4)})
    method = ProgressiveDistillation(
        ProgressiveDistillation.Options(start_steps=4, end_steps=1),
        student=unet(),
        teacher=LiveTeacher(parent),
        data=DataInfo(items=4, classes=0, example=given),
    )

    class Same:
        def steps(self, start, stop):
            return iter([[given]] * (stop - start))

    rows = []
    spec = TrainSpec(steps=3, log_every=1)
    method.options = ProgressiveDistillation.Options(start_steps=4, end_steps=1, phase_lengths=[1.0, 1.0, 1.0])
    result = Trainer(method, Same(), spec, steps=3, items=4, seed=0, record=rows.append).fit()
    assert [row["student/steps"] for row in rows] == [4, 2, 1]
    with torch.no_grad():
        assert generate(NetworkDenoiser(result), images).isfinite().all()


def test_predictions_are_of_the_noised_items():
    """What the student is compared on is where the teacher started, not where it went."""
    method = made()
    given = batch()
    x0, condition = method.read(given)
    draws = method.draws(given)
    prediction, _ = method.lesson(4, lambda x, t: method.ask(x, t, condition), x0, condition, draws)
    assert isinstance(prediction, Prediction)
    expected = Cosine().add_noise(x0, draws.normal("noise", x0), prediction.t)
    assert torch.equal(prediction.x_t, expected)
