import math

import numpy
import pytest
import torch
from torch import nn

from limbeck.core.errors import IncompatibleError
from limbeck.diffusion.denoiser import NetworkDenoiser, Process, process_of
from limbeck.diffusion.generation import generate
from limbeck.diffusion.parameterisations import Direct, Preconditioned
from limbeck.diffusion.schedules import EDM, Cosine, FlowMatching, VPDiscrete
from limbeck.diffusion.score_distillation import (
    exponential_slope,
    identity_distillation,
    power_slope,
    pseudo_huber_slope,
    score_divergence,
    squared_slope,
)
from limbeck.models.denoising_mlp import DenoisingMLP
from tests.methods.distribution.recorded import data_prediction, direct
from tests.methods.trajectory.toys import Given, Linear, build, images, with_process
from tests.oracles.oracle import load


@pytest.fixture(scope="module")
def oracle():
    (case,) = load("sim")
    return case.tensors


class Wavy(nn.Module):
    """D(z, sigma) = p0 z / (1 + sigma^2) + p1 sin(3 z / sqrt(1 + sigma^2)), the networks of the recorded losses."""

    def __init__(self, both):
        super().__init__()
        self.both = nn.Parameter(both.clone())

    def forward(self, x, time, condition):
        sigma = time.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        power = 1 + sigma.square()
        return self.both[0] * x / power + self.both[1] * (3 * x / power.sqrt()).sin()


class Gaussian(nn.Module):
    """The exact denoiser of N(mean, std^2) in EDM's schedule."""

    def __init__(self, mean=0.0, std=1.0):
        super().__init__()
        self.mean, self.std = nn.Parameter(torch.tensor(mean).double()), std

    def forward(self, x, time, condition):
        noise = time.to(x.dtype).view(-1, *[1] * (x.ndim - 1)).square()
        return (noise * self.mean + self.std**2 * x) / (self.std**2 + noise)


def method_on(teacher, critic, x, schedule=None, **options):
    process = direct(schedule or EDM(), "x0")
    student = with_process(Linear(1.0, 0.0), process)
    method = build("sim", student, x, teacher=with_process(teacher, process), **options)
    method.critic = critic
    return method


@pytest.mark.parametrize("alpha", [1.0, 1.2, 0.5])
def test_identity_distillation_is_as_recorded(oracle, alpha):
    x = oracle["x"].clone().requires_grad_()
    method = method_on(Wavy(oracle["teacher"]), Wavy(oracle["fake"]), x, distance="sid", alpha=alpha, loss_scale=100.0)
    draws = Given(5, **{"matching time": oracle["u"], "matching noise": oracle["eps"]})
    x_t, t, _ = method.noised(x, draws)
    rows = method.divergence(x, t, *method.scores_through(x_t, t, {}))
    recorded, wanted = oracle[f"alpha{alpha}.loss"], oracle[f"alpha{alpha}.grad_x"]
    torch.testing.assert_close(rows.detach(), recorded.flatten(1).sum(1), rtol=1e-4, atol=1e-5)
    loss, _ = method.student_loss(x, x.detach(), {}, draws)
    torch.testing.assert_close(loss.detach(), 100 * recorded.sum() / 5, rtol=1e-4, atol=1e-4)
    loss.backward()
    torch.testing.assert_close(x.grad * 5 / 100, wanted, rtol=1e-4, atol=1e-5)
    # Without the graph through the networks it is another gradient.
    method.scores_through = method.scores
    x.grad = None
    method.student_loss(x, x.detach(), {}, draws)[0].backward()
    assert (x.grad * 5 / 100 - wanted).norm() > 0.3 * wanted.norm()


def test_the_loss_of_the_fake_score_is_as_recorded(oracle):
    method = method_on(
        Wavy(oracle["teacher"]), Wavy(oracle["fake"]), oracle["x"], critic_loss="edm", critic_time="lognormal"
    )
    shares = torch.special.ndtr(oracle["n"].double())
    draws = Given(5, **{"critic time": shares, "critic noise": oracle["eps"]})
    (update,) = method.critic_updates(oracle["x"], oracle["x"], {}, draws)
    assert update.player == "critic"
    torch.testing.assert_close(update.loss.detach(), oracle["critic.loss"].mean(), rtol=1e-4, atol=0.0)
    update.loss.backward()
    wanted = oracle["critic.grad_fake"] / oracle["critic.loss"].numel()
    torch.testing.assert_close(method.critic.both.grad, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("units", ["data", "score"])
@pytest.mark.parametrize(("distance", "slope"), [("pseudo-huber", pseudo_huber_slope(0.3)), ("squared", squared_slope)])
def test_two_gaussians(units, distance, slope):
    """Teacher N(0, 1), student x = m + z: dL/dm is d'(y) / (1 + sigma^2) for every sample, y = m / (1 + sigma^2)."""
    m = torch.tensor([1.5, -0.5, 0.25]).double()
    shifts = m.repeat(6, 1).requires_grad_()
    x = shifts + torch.randn(6, 3).double()
    method = method_on(Gaussian(), Gaussian(), x, distance=distance, units=units, c=0.3, loss_scale=1.0)
    method.critic.mean.data = m
    draws = method.draws(images(x))
    sigma = method.noised(x, draws)[1][:, None]
    y = m / (1 + sigma.square())
    right = slope(y) / (1 + sigma.square())
    wrong = slope(y) / sigma.square()
    if units == "data":
        delta = sigma.square() * y
        right, wrong = slope(delta) * sigma.square() / (1 + sigma.square()), slope(delta)

    def gradient():
        loss, logs = method.student_loss(x, x, {}, draws)
        torch.testing.assert_close(logs["matching"], loss)
        return 6 * torch.autograd.grad(loss, shifts, retain_graph=True)[0]

    torch.testing.assert_close(gradient(), right, rtol=1e-6, atol=1e-9)
    assert (gradient() * m > 0).all()  # descending along it brings m to 0
    through = method.scores_through
    method.scores_through = lambda x_t, t, condition: through(x_t.detach(), t, condition)
    torch.testing.assert_close(gradient(), wrong, rtol=1e-6, atol=1e-9)
    assert (wrong - right).abs().max() > 0.05 * right.abs().max()


DISTANCES = {
    "pseudo-huber": (lambda y: (y.square() + 0.25).sqrt() - 0.5, pseudo_huber_slope(0.5)),
    "squared": (torch.square, squared_slope),
    "cubed": (lambda y: y.abs() ** 3, power_slope(3.0)),
    "exponential": (lambda y: (y.square() / 4).exp() - 1, exponential_slope(2.0)),
}


@pytest.mark.parametrize("name", DISTANCES)
def test_the_gradient_is_that_of_the_divergence(name):
    """x = s z against N(0, 1) at one noise level, by quadrature: the score of the student depends on x_t here."""
    distance, slope = DISTANCES[name]
    spread, sigma = torch.tensor(1.6, dtype=torch.float64, requires_grad=True), 0.8
    nodes, weights = (torch.from_numpy(row) for row in numpy.polynomial.hermite_e.hermegauss(80))
    weights = weights / weights.sum()
    z, eps = (row.reshape(-1, 1) for row in torch.meshgrid(nodes, nodes, indexing="ij"))
    x = spread * z
    x_t, t = x + sigma * eps, torch.full((len(z),), sigma).double()
    teacher, fake = (
        NetworkDenoiser(with_process(Gaussian(0.0, std), direct(EDM(), "x0")))(x_t, t) for std in (1.0, 1.6)
    )
    rows = score_divergence(x, teacher, fake, slope)
    (implicit,) = torch.autograd.grad((rows * torch.outer(weights, weights).flatten()).sum(), spread)
    # Directly: x_t's law is held fixed, and the student's denoiser depends on its parameter.
    place = math.sqrt(1.6**2 + sigma**2) * nodes
    delta = place * (spread.square() / (spread.square() + sigma**2) - 1 / (1 + sigma**2))
    (direct_one,) = torch.autograd.grad((weights * distance(delta)).sum(), spread)
    torch.testing.assert_close(implicit, direct_one, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("name", DISTANCES)
def test_slopes_are_derivatives_by_the_item(name):
    distance, slope = DISTANCES[name]
    y = torch.randn(5, 2, 3).double().requires_grad_()
    size = y.flatten(1).square().sum(1).sqrt()
    (wanted,) = torch.autograd.grad(distance(size).sum(), y)
    torch.testing.assert_close(slope(y.detach()), wanted)


def test_a_bounded_and_a_cut_slope():
    y = torch.randn(5, 7).double() * torch.logspace(-4, 4, 5).double()[:, None]
    size = pseudo_huber_slope(0.1)(y).norm(dim=1)
    assert (size < 1).all()
    assert size.max() > 0.99
    assert exponential_slope(0.1)(torch.full((1, 7), 1e3)).isfinite().all()
    assert power_slope(1.0)(torch.zeros(2, 3)).abs().max() == 0


def predictions():
    x, teacher, fake = torch.randn(3, 4, 6).double()
    return x, data_prediction(teacher, EDM()), data_prediction(fake, EDM())


def test_the_squared_distance_is_identity_distillation():
    x, teacher, fake = predictions()
    size = (x - teacher.x0).abs().mean(1)
    torch.testing.assert_close(
        score_divergence(x, teacher, fake), 2 * size * identity_distillation(x, teacher, fake, 1.0)
    )
    half = ((teacher.x0 - fake.x0) * (teacher.x0 + fake.x0 - 2 * x)).sum(1) / (2 * size)
    torch.testing.assert_close(identity_distillation(x, teacher, fake, 0.5), half)
    assert identity_distillation(teacher.x0, teacher, fake).isfinite().all()


def test_a_wide_pseudo_huber_distance_is_half_the_squared_one():
    x, teacher, fake = predictions()
    wide = score_divergence(x, teacher, fake, pseudo_huber_slope(1e5)) * 1e5
    torch.testing.assert_close(wide, score_divergence(x, teacher, fake) / 2, rtol=1e-8, atol=0.0)


def test_scores_as_units_and_the_weight():
    """The loss as it is written in scores, where alpha is not 1."""
    x = torch.randn(4, 5).double()
    teacher, critic = Wavy(torch.tensor([0.8, 0.15])), Wavy(torch.tensor([0.7, 0.25]))
    options = {"units": "score", "weight": "sigma2", "c": 0.7, "loss_scale": 3.0}
    method = method_on(teacher, critic, x, schedule=Cosine(), **options)
    draws = method.draws(images(x))
    x_t, t, noise = method.noised(x, draws)
    real, fake = method.scores_through(x_t, t, {})
    sigma = Cosine().sigma(t)[:, None]
    slope = pseudo_huber_slope(0.7)(fake.score - real.score)
    rows = -(sigma.square() * slope * (fake.score + noise / sigma)).sum(1)
    torch.testing.assert_close(method.student_loss(x, x, {}, draws)[0], 3 * rows.mean())
    with pytest.raises(IncompatibleError, match="units: data"):
        method_on(teacher, critic, x, distance="sid", units="score")


@pytest.mark.parametrize("numbers", [4, 100])
def test_the_usual_c_grows_with_the_size_of_items(numbers):
    y, method = torch.randn(2, numbers).double() * 1e-3, method_on(Gaussian(), Gaussian(), torch.randn(2, numbers))
    expected = y / (y.square().sum(1, keepdim=True) + (0.00054 * math.sqrt(numbers)) ** 2).sqrt()
    torch.testing.assert_close(method.slope(numbers)(y), expected)


class Dropping(DenoisingMLP):
    """Notes the modes in which it was called."""

    modes = ()

    def forward(self, x, time, condition):
        self.modes = (*self.modes, self.training)
        return super().forward(x, time, condition)


def test_the_fake_score_moves_first_and_only_inputs_carry_gradients():
    x0 = torch.randn(8, 2)
    process = Process(EDM(), Preconditioned(1.0))
    teacher, student = with_process(Dropping(2, 0, 8, 2), process), Dropping(2, 0, 8, 2)
    method = build("sim", student, x0, teacher=teacher)
    method.train()
    norms = []
    for is_moved in (False, True):
        running = method.step(images(x0))
        first = next(running)
        assert first.player == "critic"
        first.loss.backward(inputs=list(method.critic.parameters()))
        with torch.no_grad():
            for parameter in method.critic.parameters():
                parameter.grad = None
                parameter.mul_(1.2 if is_moved else 1.0)
        method.critic.modes = ()
        (second,) = running
        assert second.player == "student"
        assert method.critic.modes == (False,)
        assert method.critic.training
        second.loss.backward()
        norms.append(math.hypot(*(float(p.grad.norm()) for p in student.parameters() if p.grad is not None)))
        student.zero_grad()
        # The fake score starts as the teacher: nothing to learn until it has moved.
        assert (second.loss != 0) == (second.logs["gap"] > 0) == is_moved
        assert all(p.grad is None for network in (method.critic, teacher) for p in network.parameters())
        assert all(p.requires_grad for p in method.critic.parameters())
    assert norms[0] < 1e-4 * norms[1]


def test_the_teacher_keeps_no_graph_unless_it_is_asked_through():
    x = torch.randn(4, 2, requires_grad=True)
    method, t = build("sim", DenoisingMLP(2, 0, 4, 1), x.detach(), teacher=edm_network()), torch.ones(4).double()
    assert not method.ask(x, t, {}).x0.requires_grad
    through = method.ask_through(x, t, {}).x0
    torch.testing.assert_close(through.detach(), method.ask(x, t, {}).x0)
    through.sum().backward()
    assert x.grad.abs().max() > 0
    assert all(p.grad is None for p in method.teacher.model.parameters())


def test_a_low_rank_fake_score_is_seen_through_too():
    x0 = torch.randn(8, 2)
    method = build("sim", DenoisingMLP(2, 0, 8, 1), x0, teacher=edm_network(), critic="low-rank", critic_rank=2)
    with torch.no_grad():
        for parameter in method.critic.parameters():
            parameter.add_(0.3)
    _, update = method.step(images(x0))
    update.loss.backward()
    assert method.student.exit.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in (*method.critic.parameters(), *method.teacher.model.parameters()))


def test_levels_reach_from_the_least_to_tmax():
    x = torch.zeros(2, 3)
    method = method_on(Gaussian(), Gaussian(), x)
    _, t, _ = method.noised(x, Given(2, **{"matching time": torch.tensor([0.0, 1.0])}))
    ends = [0.002 ** (1 / 7), 80 ** (1 / 7)]
    assert t.tolist() == pytest.approx([0.002, (0.2 * ends[0] + 0.8 * ends[1]) ** 7])
    discrete = method_on(Gaussian(), Gaussian(), x, schedule=VPDiscrete.named())
    _, t, _ = discrete.noised(x, Given(2, **{"matching time": torch.tensor([0.0, 1 - 2**-24])}))
    assert t.tolist() == [0, 800]
    draws = discrete.noised_for_critic(x, Given(2, **{"critic time": torch.tensor([0.0, 1 - 2**-24])}))
    assert draws[1].tolist() == [0, 999]


def test_the_first_input_is_where_noise_is_two_and_a_half_times_the_data():
    x0, student = torch.randn(4, 2), DenoisingMLP(2, 0, 4, 1)
    method = build("sim", student, x0, teacher=edm_network())
    assert process_of(student).sampling.times == pytest.approx((2.5, 0.0))
    noise = torch.randn(4, 2)
    expected = method.denoiser(2.5 * noise, torch.full((4,), 2.5).double()).x0
    torch.testing.assert_close(generate(method.denoiser, noise), expected)
    torch.testing.assert_close(method.samples(x0, {}, Given(4, noise=noise)), expected)
    assert method.usual_input_time(EDM(0.05, 2.0)) == 2.0
    assert method.usual_input_time(FlowMatching()) == pytest.approx(2.5 / 3.5)
    table = VPDiscrete.named()
    time = method.usual_input_time(table)
    assert time == int(time)
    ratio = table.sigma(torch.tensor(time)) / table.alpha(torch.tensor(time))
    assert float(ratio) == pytest.approx(2.5, rel=0.01)


def edm_network():
    return with_process(DenoisingMLP(2, 0, 8, 2), Process(EDM(), Preconditioned(1.0)))


def test_a_network_of_noise_learns_by_its_own_error():
    x0 = torch.randn(4, 2)
    teacher = with_process(DenoisingMLP(2, 0, 4, 1), Process(VPDiscrete.named(), Direct("eps", 0.001)))
    method = build("sim", DenoisingMLP(2, 0, 4, 1), x0, teacher=teacher)
    critic, _ = method.step(images(x0))
    draws = method.draws(images(x0))
    x = method.samples(x0, {}, draws).detach()
    x_t, t, noise = method.noised_for_critic(x, draws)
    torch.testing.assert_close(critic.loss, (method.fake(x_t, t).eps - noise).square().mean())
