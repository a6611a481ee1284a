import math

import pytest
import torch
from torch import nn

from limbeck.core.method import Clock
from limbeck.core.randomness import reseed
from limbeck.diffusion.denoiser import Process, condition_of, process_of
from limbeck.diffusion.generation import generate
from limbeck.diffusion.grids import karras_times
from limbeck.diffusion.mixture import GaussianMixtureDenoiser
from limbeck.diffusion.parameterisations import Preconditioned
from limbeck.diffusion.schedules import EDM, Cosine, VPDiscrete
from limbeck.methods.trajectory.ict import continuous_nearer_level
from limbeck.models.denoising_mlp import DenoisingMLP
from tests.methods.trajectory.toys import Given, Linear, build, images, info, only_update, with_process
from tests.oracles.oracle import load

BOUNDARY = Process(EDM(), Preconditioned(0.5, boundary=True, noise="250-log"))
PLAIN = Process(EDM(), Preconditioned(0.5, noise="250-log"))


@pytest.fixture(scope="module")
def oracle():
    (case,) = load("ict")
    return case.tensors


def recorded(slug, oracle, teacher=None, **options):
    """The recorded losses' networks, pairs and noise in one of the three methods."""
    student = with_process(Linear(0.7, 0.05), BOUNDARY)
    method = build(
        slug, student, oracle["ct_x0"], teacher=teacher, metric="squared", target="average", target_decay=0.0, **options
    )
    method.target.a.fill_(0.6)
    method.target.b.fill_(-0.02)
    falling = karras_times(int(oracle["ct_num_scales"]))
    chosen = oracle["ct_idx"]
    method.pair_levels = lambda draws: (falling[chosen + 1], falling[chosen])
    method.draws = lambda batch: Given(4, noise=oracle["ct_noise"])
    return method


def check(method, oracle, losses, gradient_a, gradient_b):
    update = only_update(method, images(oracle["ct_x0"]))
    torch.testing.assert_close(update.loss, oracle[losses].mean(), rtol=2e-5, atol=0)
    update.loss.backward()
    torch.testing.assert_close(method.student.a.grad, oracle[gradient_a], rtol=1e-4, atol=0)
    torch.testing.assert_close(method.student.b.grad, oracle[gradient_b], rtol=1e-4, atol=0)
    assert all(buffer.grad is None for buffer in method.target.buffers())


@pytest.mark.parametrize("slug", ["ict", "consistency-training"])
@pytest.mark.parametrize("weighting", ["uniform", "karras"])
def test_consistency_training_matches_the_recorded_losses(oracle, slug, weighting):
    method = recorded(slug, oracle, weighting=weighting)
    names = [f"ct_{part}_{weighting}" for part in ("loss", "grad_a", "grad_b")]
    check(method, oracle, *names)


def test_consistency_distillation_matches_the_recorded_losses(oracle):
    teacher = with_process(Linear(0.5, 0.01), PLAIN)
    check(recorded("consistency-distillation", oracle, teacher), oracle, "cd_loss", "cd_grad_a", "cd_grad_b")


def test_the_levels_are_drawn_as_the_lognormal_says(oracle):
    x0 = torch.zeros(60000, 1)
    method = build("ict", DenoisingMLP(1), x0)
    assert method.scales() == 11
    low, high = method.pair_levels(method.draws(images(x0)))
    grid = karras_times(11, rising=True)
    place = torch.searchsorted(grid, low)
    torch.testing.assert_close(grid[place + 1], high)
    shares = place.bincount(minlength=10) / len(place)
    torch.testing.assert_close(shares.double(), oracle["pdf_11"].double(), atol=0.01, rtol=0)
    torch.testing.assert_close(
        method.weight(low, high)[:50], oracle["weights_11"].double()[place[:50]], rtol=1e-4, atol=0
    )


def test_uniform_intervals_are_equally_likely():
    x0 = torch.zeros(20000, 1)
    method = build("consistency-training", DenoisingMLP(1), x0, curriculum="constant", last_scales=10)
    low, _ = method.pair_levels(method.draws(images(x0)))
    shares = torch.searchsorted(karras_times(11, rising=True), low).bincount(minlength=10) / len(low)
    assert (shares - 0.1).abs().max() < 0.01


def test_the_number_of_levels_doubles():
    method = build("ict", DenoisingMLP(1), torch.zeros(2, 1))
    seen = []
    for step in (0, 49999, 50000, 100000, 399999):
        method.clock = Clock(step, 400000)
        seen.append(method.scales())
    assert seen == [11, 11, 21, 41, 1281]


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("inverse-gap", lambda low, high: 1 / (high - low)),
        ("inverse-root-gap", lambda low, high: (high - low) ** -0.5),
        ("inverse-c-out", lambda low, high: math.sqrt(high**2 + 0.25) / (0.5 * high)),
        ("inverse-c-out-squared", lambda low, high: (high**2 + 0.25) / (0.5 * high) ** 2),
        ("inverse-sigma-squared", lambda low, high: high**-2),
        ("karras", lambda low, high: high**-2 + 4),
        ("uniform", lambda low, high: 1.0),
    ],
)
def test_weights(weighting, expected):
    method = build("ict", DenoisingMLP(1), torch.zeros(2, 1), weighting=weighting)
    low, high = torch.tensor([0.1, 2.0]).double(), torch.tensor([0.4, 3.0]).double()
    wanted = [expected(a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
    torch.testing.assert_close(method.weight(low, high), torch.tensor(wanted).double())


def test_the_function_is_the_identity_at_the_smallest_noise():
    method = build("ict", DenoisingMLP(4), torch.zeros(2, 4))
    x = torch.randn(3, 4)
    torch.testing.assert_close(method.denoiser(x, torch.full((3,), 0.002).double()).x0, x, rtol=0, atol=1e-7)


class PointMass(nn.Module):
    """The network whose consistency function is mu + (s_min / s)(x - mu), exact for data at one point."""

    def __init__(self, mu: float) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.tensor(mu).double())

    def forward(self, x, time, condition):
        sigma = (4 * time).exp()[:, None]
        made = Preconditioned(0.5, boundary=True)
        noisy = x / (sigma**2 + 0.25).rsqrt()
        c_skip, c_out = (c[:, None] for c in made.scalings(sigma[:, 0], EDM()))
        return (self.mu + 0.002 / sigma * (noisy - self.mu) - c_skip * noisy) / c_out


@pytest.mark.parametrize("target", ["stop-gradient", "average"])
def test_the_exact_function_of_a_point_has_no_loss(target):
    x0 = torch.full((64, 3), 0.7).double()
    method = build("ict", PointMass(0.7), x0, target=target)
    assert only_update(method, images(x0)).loss.item() < 1e-6


def test_no_gradient_passes_through_the_nearer_end():
    x0 = torch.randn(8, 2)
    method = build("ict", DenoisingMLP(2, width=16), x0)
    asked = []
    real = type(method).answering

    def answering(self=method):
        asked.append(torch.is_grad_enabled())
        return real(self)

    method.answering = answering
    only_update(method, images(x0))
    assert asked == [False]


def test_both_ends_drop_the_same_units():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.masks = nn.Parameter(torch.ones(())), []

        def forward(self, x, time, condition):
            mask = nn.functional.dropout(torch.ones_like(x), 0.5, training=True)
            self.masks.append(mask)
            return self.scale * mask

    student, x0 = Dropping(), torch.randn(4, 16)
    method = build("ict", student, x0)
    reseed(0)
    only_update(method, images(x0))
    after = torch.rand(())
    assert torch.equal(student.masks[0], student.masks[1])
    reseed(0)
    nn.functional.dropout(torch.ones_like(x0), 0.5)
    assert torch.equal(after, torch.rand(())), "the stream goes on as if the first alone had drawn"


def test_the_average_follows_with_the_adaptive_decay():
    method = build("consistency-training", DenoisingMLP(2, width=8), torch.zeros(2, 2))
    method.clock = Clock(50, 100)
    assert method.decay() == pytest.approx(math.exp(2 * math.log(0.9) / method.scales()))
    before = {name: value.clone() for name, value in method.target.named_buffers()}
    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter.add_(1.0)
    method.after_update("student", {})
    kept = method.decay()
    now = dict(method.target.named_buffers())
    for name, parameter in method.student.named_parameters():
        torch.testing.assert_close(now[name], kept * before[name] + (1 - kept) * parameter.detach())
    assert not list(method.target.parameters())


def test_continuous_levels_approach_with_the_stages():
    high = torch.tensor([0.01, 1.0, 80.0]).double()
    for stage in (0, 3, 7):
        q = 1 - 2.0 ** -(stage + 1)
        wanted = [max(t - t * (1 - q) * (1 + 8 / (1 + math.exp(t))), 1e-6) for t in high.tolist()]
        torch.testing.assert_close(continuous_nearer_level(high, stage), torch.tensor(wanted).double())
    method = build("ict", DenoisingMLP(2), torch.zeros(5, 2), pairing="continuous")
    method.clock = Clock(99, 100)
    low, high = method.pair_levels(method.draws(images(torch.zeros(5, 2))))
    assert ((low < high) | (high == 0.002)).all()
    assert (low >= 0.002).all()


@pytest.mark.parametrize("schedule", [EDM(), Cosine(), VPDiscrete.named()], ids=["edm", "cosine", "discrete"])
def test_a_teacher_of_any_schedule_gives_the_same_path(schedule):
    """The nearer end by the exact denoiser of one Gaussian is known in closed form, whatever the teacher's schedule."""
    teacher = GaussianMixtureDenoiser(torch.tensor([[0.3, -0.2]]), 0.5, schedule)
    x0 = torch.randn(16, 2)
    method = build(
        "consistency-distillation", DenoisingMLP(2), x0, teacher=teacher, curriculum="constant", last_scales=400
    )
    low, high = method.pair_levels(method.draws(images(x0)))
    inside = high < 20  # beyond, the discrete schedule has no times
    x_hi = x0 + high[:, None] * torch.randn(16, 2)
    x_lo = method.nearer(x_hi.float(), high, low, x0, x0, {})
    shrink = ((low**2 + 0.25) / (high**2 + 0.25)).sqrt()[:, None]
    exact = teacher.means + shrink * (x_hi - teacher.means)
    torch.testing.assert_close(x_lo[inside].double(), exact[inside].double(), atol=2e-3, rtol=0)


def test_guided_distillation_steps_are_guided():
    teacher = GaussianMixtureDenoiser.ring(EDM(), classes=4)
    x0, labels = torch.randn(6, 2), torch.arange(6) % 4
    steps = {}
    for scale in (1.0, 3.0):
        method = build("consistency-distillation", DenoisingMLP(2), x0, teacher=teacher, classes=4, guidance=scale)
        low, high = method.pair_levels(method.draws(images(x0, labels)))
        _, condition = method.read(images(x0, labels))
        steps[scale] = method.nearer(x0 * 3, high, low, x0, x0, condition)
    assert not torch.allclose(steps[1.0], steps[3.0])


def test_one_and_two_steps_are_sampled_at_their_levels():
    method = build("ict", DenoisingMLP(2, width=8), torch.zeros(2, 2))
    process = process_of(method.student)
    assert process.sampling.times_for(process.schedule).tolist() == [80.0, 0.0]
    assert process.sampling.times_for(process.schedule, 2).tolist() == pytest.approx([80.0, 0.821, 0.0])
    noise = torch.randn(5, 2)
    one = generate(method.denoiser, noise)
    torch.testing.assert_close(one, method.denoiser(80 * noise, torch.full((5,), 80.0).double()).x0)
    assert generate(method.denoiser, noise, condition_of({}), steps=2).shape == (5, 2)


def test_data_without_classes_have_no_condition():
    assert info(torch.zeros(2, 2)).classes == 0
    method = build("ict", DenoisingMLP(2), torch.zeros(2, 2))
    assert method.read(images(torch.zeros(2, 2), torch.tensor([-100, -100])))[1] == {}
