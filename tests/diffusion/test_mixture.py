import math

import pytest
import torch

from limbeck.diffusion.guidance import guided
from limbeck.diffusion.mixture import GaussianMixtureDenoiser
from limbeck.diffusion.schedules import Cosine
from tests.diffusion.cases import SCHEDULES, normal, times_of

MEANS = torch.tensor([[1.0, 0.4, -0.2], [-0.7, -1.1, 0.5], [-0.2, 0.9, 0.1]], dtype=torch.float64)
STD = torch.tensor([0.5, 0.3, 0.8], dtype=torch.float64)
WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 0])


def mixture(schedule, labels=LABELS):
    return GaussianMixtureDenoiser(MEANS, STD, schedule, WEIGHTS, labels)


def loop(schedule, x_t, t, label=-1):
    """Posterior over components and E[x0 | x_t], number by number."""
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    joint, centres = [], []
    for mean, std, weight, own in zip(MEANS.tolist(), STD.tolist(), WEIGHTS.tolist(), LABELS.tolist(), strict=True):
        variance = alpha**2 * std**2 + sigma**2
        distance = sum((x - alpha * m) ** 2 for x, m in zip(x_t.tolist(), mean, strict=True))
        density = math.exp(-distance / (2 * variance)) / (2 * math.pi * variance) ** 1.5
        joint.append(weight * density if label in (-1, own) else 0.0)
        gain = alpha * std**2 / variance
        centres.append([m + gain * (x - alpha * m) for x, m in zip(x_t.tolist(), mean, strict=True)])
    share = [value / sum(joint) for value in joint]
    return share, [sum(r * centre[d] for r, centre in zip(share, centres, strict=True)) for d in range(3)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_against_a_loop(name):
    schedule = SCHEDULES[name]
    model, t = mixture(schedule), times_of(schedule, 5)
    x_t = schedule.add_noise(normal(5, 3), normal(5, 3, seed=1), t)
    label = torch.tensor([-1, 0, 1, 0, -1])
    share, x0 = model.posterior(x_t, t, {"label": label}), model(x_t, t, {"label": label}).x0
    for row in range(5):
        expected_share, expected_x0 = loop(schedule, x_t[row], t[row], int(label[row]))
        torch.testing.assert_close(share[row], torch.tensor(expected_share, dtype=torch.float64), rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(x0[row], torch.tensor(expected_x0, dtype=torch.float64), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_score_is_the_gradient_of_the_log_density(name):
    schedule = SCHEDULES[name]
    model, t = mixture(schedule), times_of(schedule, 5)
    x_t = schedule.add_noise(normal(5, 3), normal(5, 3, seed=1), t).requires_grad_()
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    variance = alpha.square() * STD.square() + sigma.square()
    distance = (x_t[:, None] - alpha[..., None] * MEANS).square().sum(-1)
    density = (WEIGHTS.log() - distance / (2 * variance) - 1.5 * variance.log()).logsumexp(1)
    (score,) = torch.autograd.grad(density.sum(), x_t)
    torch.testing.assert_close(model(x_t.detach(), t).score, score, rtol=1e-7, atol=1e-7)


def test_labels_and_the_null_label():
    schedule = Cosine()
    model, t = mixture(schedule), torch.tensor([0.4, 0.4]).double()
    x_t = normal(1, 3).expand(2, 3)
    given = {"label": torch.tensor([0, 1])}
    only_1 = GaussianMixtureDenoiser(MEANS[1:2], STD[1:2], schedule)
    torch.testing.assert_close(model(x_t, t, given).x0[1], only_1(x_t, t).x0[1])
    unconditional = model(x_t, t).x0
    assert not model(x_t, t, given).x0[0].allclose(unconditional[0])
    assert model(x_t, t, model.null(given)).x0.equal(unconditional)
    assert mixture(schedule, None)(x_t, t, given).x0.equal(unconditional)
    assert model.null({}) == {}
    assert given["label"].tolist() == [0, 1]  # not changed in place


def test_items_of_any_shape():
    schedule = Cosine()
    model = GaussianMixtureDenoiser(normal(4, 8), 0.3, schedule)
    x_t, t = normal(3, 8, seed=1), times_of(schedule, 3)
    shaped = model(x_t.view(3, 2, 2, 2), t)
    assert shaped.x0.shape == (3, 2, 2, 2)
    assert shaped.x0.flatten(1).equal(model(x_t, t).x0)


def test_far_away_and_without_noise():
    """No overflow where densities vanish, and x0 = x_t at the clean end."""
    for schedule in (SCHEDULES["scaled-linear"], SCHEDULES["edm"]):
        model = GaussianMixtureDenoiser.ring(schedule)
        far = torch.full((2, 2), 1e4)
        t = torch.tensor([schedule.t_min, schedule.t_max])
        said = model(far, t)
        assert said.x0.isfinite().all()
        assert said.score.isfinite().all()
        x = model.draw(5)
        torch.testing.assert_close(model(x, torch.full((5,), schedule.clean)).x0, x)


def test_the_moments_of_draws():
    model = mixture(Cosine())
    torch.manual_seed(0)
    drawn = model.draw(100000)
    mean = WEIGHTS @ MEANS
    covariance = (MEANS - mean).T @ (WEIGHTS[:, None] * (MEANS - mean)) + torch.eye(3) * (WEIGHTS @ STD.square())
    torch.testing.assert_close(drawn.mean(0), mean, rtol=0, atol=0.01)
    torch.testing.assert_close(drawn.T.cov(), covariance, rtol=0, atol=0.02)
    one = model.draw(20000, label=1)
    torch.testing.assert_close(one.mean(0), MEANS[1], rtol=0, atol=0.01)
    torch.testing.assert_close(one.std(0), STD[1].expand(3), rtol=0, atol=0.01)
    zeros = model.draw(20000, label=0)
    share = WEIGHTS[[0, 2]] / WEIGHTS[[0, 2]].sum()
    torch.testing.assert_close(zeros.mean(0), share @ MEANS[[0, 2]], rtol=0, atol=0.03)


def test_draws_follow_torchs_stream():
    model = mixture(Cosine())
    torch.manual_seed(3)
    first = model.draw(4)
    torch.manual_seed(3)
    assert model.draw(4).equal(first)


def test_the_ring():
    model = GaussianMixtureDenoiser.ring(Cosine(), modes=8, radius=1.4, std=0.1, classes=4)
    torch.testing.assert_close(model.means.norm(dim=1), torch.full((8,), 1.4))
    assert model.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    torch.manual_seed(0)
    drawn = model.draw(20000)
    assert (drawn.std(0) - 1).abs().max() < 0.03
    assert model.label_of(model.means).tolist() == list(range(8))
    assert set(model.label_of(model.draw(200, label=2)).tolist()) == {4, 5}


def test_guidance_moves_towards_the_class():
    schedule = Cosine()
    model, t = mixture(schedule), torch.full((1,), 0.6).double()
    x_t, label = normal(1, 3), {"label": torch.tensor([1])}
    distances = [float((guided(model, x_t, t, label, g).x0 - MEANS[1]).norm()) for g in (0.0, 0.5, 1.0)]
    assert distances[0] > distances[1] > distances[2]
    assert model.posterior(x_t, t, label).tolist() == [[0.0, 1.0, 0.0]]


def test_its_tensors_are_buffers():
    model = mixture(Cosine())
    assert set(model.state_dict()) == {"means", "std", "log_weights", "labels"}
    assert not list(model.parameters())
    assert model.float()(normal(1, 3, dtype=torch.float32), torch.tensor([0.5])).x0.dtype == torch.float32
