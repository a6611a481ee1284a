import math

import pytest
import torch

from limbeck.core.errors import IncompatibleError
from limbeck.core.registry import method_class
from limbeck.diffusion.denoiser import Process
from limbeck.diffusion.mixture import GaussianMixtureDenoiser
from limbeck.diffusion.parameterisations import Preconditioned
from limbeck.diffusion.schedules import EDM
from limbeck.diffusion.score_distillation import distribution_direction, inject_gradient
from limbeck.methods.distribution.f_distill import TimeBins, density_ratio
from limbeck.models.denoising_mlp import DenoisingMLP
from limbeck.objectives.adversarial import logistic_discriminator, logistic_generator
from limbeck.objectives.f_divergences import f_divergence
from tests.methods.distribution.recorded import data_prediction
from tests.methods.distribution.test_dmd2 import close, steps_of, teacher_of
from tests.methods.trajectory.toys import build, images, with_process
from tests.oracles.oracle import load

NAMES = {
    "rkl": "reverse-kl",
    "sf": "softened-reverse-kl",
    "js": "jensen-shannon",
    "sh": "squared-hellinger",
    "kl": "forward-kl",
    "jf": "jeffreys",
    "neyman": "neyman-chi2",
}
CONSTANTS = {"sh": 0.25, "neyman": 2.0}  # left out of the recorded table; they vanish in the normalisation
DIVERGENCES = [*NAMES.values(), "pearson-chi2"]


@pytest.fixture(scope="module")
def oracle():
    (case,) = load("f-distill")
    return case.tensors


def method_with(**options):
    return build("f-distill", DenoisingMLP(2, 0, 4, 1), torch.randn(8, 2), teacher=teacher_of(), **options)


@pytest.mark.parametrize("short", NAMES)
def test_the_table_is_as_recorded(oracle, short):
    weight = f_divergence(NAMES[short]).weight(oracle["table.r"])
    close(weight / CONSTANTS.get(short, 1.0), oracle[f"table.h.{short}"].expand(8), rtol=1e-5)


@pytest.mark.parametrize("short", [name for name in NAMES if name != "rkl"])
def test_weights_of_a_batch_are_as_recorded(oracle, short):
    method = method_with(divergence=NAMES[short], ratio_bins=4, ratio_decay=0.5)
    close(method.ratio_weight(oracle["logits"], oracle["t"]), oracle[f"h.{short}.norm1"], rtol=2e-5)
    close(method.bins.means, oracle[f"bins_after.{short}"], rtol=1e-5)
    method = method_with(divergence=NAMES[short], ratio_bins=0)
    close(method.ratio_weight(oracle["logits"], oracle["t"]), oracle[f"h.{short}.norm0"], rtol=2e-5)


@pytest.mark.parametrize("case", ["plain", "js"])
def test_weighted_matching_is_as_recorded(oracle, case):
    x = oracle["vsd.x"].clone().requires_grad_()
    teacher, fake = (data_prediction(oracle[f"vsd.D_{who}"], EDM()) for who in ("teacher", "fake"))
    weight = None if case == "plain" else oracle["h.js.norm1"]
    loss = inject_gradient(x, distribution_direction(x.detach(), teacher, fake, weight, floor=1e-6))
    loss.backward()
    close(loss, oracle[f"vsd.{case}.loss"], rtol=1e-5)
    close(x.grad, oracle[f"vsd.{case}.grad_x"], rtol=1e-5, atol=1e-9)


def test_the_game_is_as_recorded(oracle):
    logits = oracle["logits"]
    close(logistic_generator(logits), oracle["gan.gen_loss"], rtol=1e-5)
    close(logistic_discriminator(logits.flip(0), logits), oracle["gan.disc_loss"], rtol=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_weight_is_the_second_derivative_times_the_ratio_squared(name):
    ratio = torch.logspace(-1, 1, 9, dtype=torch.float64, requires_grad=True)
    row = f_divergence(name)
    (first,) = torch.autograd.grad(row.f(ratio).sum(), ratio, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), ratio)
    torch.testing.assert_close(row.weight(ratio).detach(), second * ratio.detach().square())


def test_weights_that_are_made_of_others():
    ratio = torch.logspace(-1, 1, 9)
    weight = {name: f_divergence(name).weight(ratio) for name in DIVERGENCES}
    torch.testing.assert_close(weight["jensen-shannon"], 1 - weight["softened-reverse-kl"])
    torch.testing.assert_close(weight["jeffreys"], weight["reverse-kl"] + weight["forward-kl"])


@pytest.mark.parametrize("name", DIVERGENCES)
def test_two_gaussians(name):
    """d/dm D_f(N(0, 1) || N(m, 1)) = m E_q[h(r)], by quadrature and a finite difference."""
    row, x = f_divergence(name), torch.linspace(-12, 12, 20001, dtype=torch.float64)
    m, step = 0.6, 1e-4

    def densities(mean):
        p, q = (torch.exp(-(x - centre).square() / 2) / math.sqrt(2 * math.pi) for centre in (0.0, mean))
        return p, q, torch.exp((x - mean).square() / 2 - x.square() / 2)

    def divergence(mean):
        _, q, ratio = densities(mean)
        return torch.trapezoid(q * row.f(ratio), x)

    _, q, ratio = densities(m)
    weighted = m * torch.trapezoid(q * row.weight(ratio), x)
    slope = (divergence(m + step) - divergence(m - step)) / (2 * step)
    assert float(slope) == pytest.approx(float(weighted), rel=1e-4)
    if name in ("forward-kl", "reverse-kl"):
        assert float(weighted) == pytest.approx(m, rel=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_weight_is_one_on_average(name):
    method = method_with(divergence=name)
    weight = method.ratio_weight(torch.randn(64, 2), torch.rand(64) * 80)
    assert abs(weight.mean() - 1) < 1e-4
    assert (weight.var() < 1e-10) == (name == "reverse-kl")


def test_reverse_kl_is_dmd2():
    """The gradient in the student's weights is dmd2's, but for the game's part that both have."""
    x0, gradients = torch.randn(8, 2), []
    for slug in ("dmd2", "f-distill"):
        torch.manual_seed(3)
        shared = {"features": "teacher", "gan_shares_noise": True, "floor": 1e-6}
        own = {"divergence": "reverse-kl"} if slug == "f-distill" else {}
        student = DenoisingMLP(2, 0, 4, 1)
        method = build(slug, student, x0, teacher=teacher_of(), **shared, **own)
        with torch.no_grad():
            for parameter in method.critic.parameters():
                parameter.mul_(1.5)  # so that there is a difference of scores
        update = next(method.step(images(x0)))
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(update.loss, list(student.parameters()))]))
    assert gradients[0].norm() > 1e-4
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-8)


def test_ratios_are_of_the_mean_logit_and_clamped():
    logits = torch.tensor([[0.0, 2.0], [-30.0, -30.0], [5.0, 7.0]])
    torch.testing.assert_close(density_ratio(logits, 0.1, 20.0), torch.tensor([math.e, 0.1, 20.0]))


def test_bins_keep_what_they_are_not_told():
    bins = TimeBins(4, 0.5)
    bins.take_in(torch.tensor([3.0, 5.0, 9.0]), torch.tensor([1.0, 19.0, 80.0]), EDM())
    torch.testing.assert_close(bins.means, torch.tensor([2.5, 1.0, 1.0, 5.0]))
    torch.testing.assert_close(bins.of(torch.tensor([0.002, 80.0, 30.0]), EDM()), torch.tensor([2.5, 5.0, 1.0]))


def test_whose_turn_it_is():
    moved = steps_of(method_class("f-distill"), {"critic_updates": 2})
    assert ["student" in names for names in moved] == [True, False, True, False]
    for player in ("critic", "discriminator"):
        assert [player in names for names in moved] == [False, True, False, True]


def test_the_discriminator_leaves_the_fake_score_alone():
    x0 = torch.randn(8, 2)
    method = build("f-distill", DenoisingMLP(2, 0, 4, 1), x0, teacher=teacher_of(), features="critic")
    draws = method.draws(images(x0))
    _, game = method.critic_updates(torch.randn(8, 2), x0, {}, draws)
    assert game.player == "discriminator"
    game.loss.backward()
    assert all(parameter.grad is None for parameter in method.critic.parameters())
    assert all(parameter.grad is not None for parameter in method.discriminator.parameters())


def test_an_exact_teacher_needs_another_networks_features():
    mixture = GaussianMixtureDenoiser.ring(EDM())
    with pytest.raises(IncompatibleError, match="features: own"):
        build("f-distill", student(), torch.randn(8, 2), teacher=mixture)
    method = build("f-distill", student(), torch.randn(8, 2), teacher=mixture, features="own")
    assert set(method.players()) == {"student", "critic", "discriminator"}
    with pytest.raises(IncompatibleError, match="gan_weight"):
        build("f-distill", student(), torch.randn(8, 2), teacher=mixture, gan_weight=0.0)


def student():
    return with_process(DenoisingMLP(2, 0, 8, 2), Process(EDM(), Preconditioned(1.0)))
