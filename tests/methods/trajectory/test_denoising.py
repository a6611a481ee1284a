"""How diffusion teachers are trained: the loss against plain arithmetic, and what minimises it."""

import math

import pytest
import torch
from torch import nn

from limbeck.diffusion.denoiser import NetworkDenoiser, Process, Sampling, note_process, process_of
from limbeck.diffusion.mixture import GaussianMixtureDenoiser
from limbeck.diffusion.parameterisations import Direct, Preconditioned
from limbeck.diffusion.schedules import EDM, Cosine, FlowMatching, TrigFlow, VPDiscrete
from limbeck.models.denoising_mlp import DenoisingMLP
from limbeck.models.saved import load_model, save_model
from tests.methods.trajectory.toys import Given, Linear, build, images, only_update

X0 = torch.randn(4, 1, 1, 3, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(4, 1, 1, 3, generator=torch.Generator().manual_seed(1))
TIMES = torch.tensor([0.1, 0.35, 0.6, 0.9])
A, B = 0.7, -0.3
SCHEDULES = ["cosine", "linear", "scaled-linear", "squared-cosine", "flow", "trig"]


def loss_of(method, draws=None, labels=None, x0=X0):
    given = draws or Given(len(x0), time=TIMES, noise=NOISE)
    method.draws = lambda batch: given
    return only_update(method, images(x0, labels))


def coefficients(schedule: str, share: float) -> tuple[float, float, float, float, float, float]:
    """Time, alpha, sigma, their derivatives, and what the network is told, by the papers' own formulas."""
    if schedule in ("cosine", "trig"):
        end = math.pi / 2
        low = 2 / math.pi * math.atan(math.exp(-10)) if schedule == "cosine" else 0.0
        t = low + share * (1 - 2 * low) if schedule == "cosine" else share * end
        angle, rate = (end * t, end) if schedule == "cosine" else (t, 1.0)
        return t, math.cos(angle), math.sin(angle), -rate * math.sin(angle), rate * math.cos(angle), t
    if schedule == "flow":
        return share, 1 - share, share, -1.0, 1.0, share
    t = math.floor(1000 * share)
    if schedule == "squared-cosine":
        bar = [math.cos((k / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(1001)]
        betas = [min(1 - bar[k + 1] / bar[k], 0.999) for k in range(1000)]
    elif schedule == "linear":
        betas = [1e-4 + (0.02 - 1e-4) * k / 999 for k in range(1000)]
    else:
        low, high = math.sqrt(0.00085), math.sqrt(0.012)
        betas = [(low + (high - low) * k / 999) ** 2 for k in range(1000)]
    signal = math.prod(1 - beta for beta in betas[: t + 1])
    return t, math.sqrt(signal), math.sqrt(1 - signal), math.nan, math.nan, t / 1000


@pytest.mark.parametrize(
    ("schedule", "kind"),
    [
        *((schedule, kind) for schedule in SCHEDULES for kind in ("eps", "x0", "v")),
        *((schedule, "velocity") for schedule in ("cosine", "flow", "trig")),  # nobody trains that of a table
    ],
)
def test_the_loss_by_hand(schedule, kind):
    method = build("denoising", Linear(A, B), X0, schedule=schedule, kind=kind)
    total = 0.0
    for share, item, noise in zip(TIMES.tolist(), X0.flatten(1).tolist(), NOISE.flatten(1).tolist(), strict=True):
        _, alpha, sigma, alpha_rate, sigma_rate, told = coefficients(schedule, share)
        for x, e in zip(item, noise, strict=True):
            target = {"eps": e, "x0": x, "v": alpha * e - sigma * x, "velocity": alpha_rate * x + sigma_rate * e}[kind]
            total += (A * (alpha * x + sigma * e) + B * told - target) ** 2
    update = loss_of(method)
    assert (update.player, update.weight) == ("student", 4)
    assert float(update.loss.detach()) == pytest.approx(total / 12, rel=2e-5)
    update.loss.backward()
    assert method.student.a.grad.abs() > 0


def test_gradients_by_differences():
    def value(a):
        return float(loss_of(build("denoising", Linear(a, B), X0, schedule="flow", kind="velocity")).loss.detach())

    method = build("denoising", Linear(A, B), X0, schedule="flow", kind="velocity")
    loss_of(method).loss.backward()
    assert float(method.student.a.grad) == pytest.approx((value(A + 0.01) - value(A - 0.01)) / 0.02, rel=1e-3)


def edm_levels(method):
    """The noise levels of the recorded draws, by the normal quantiles of the lognormal law."""
    from statistics import NormalDist

    return [math.exp(-1.2 + 1.2 * NormalDist().inv_cdf(share)) for share in TIMES.tolist()]


@pytest.mark.parametrize("data", [0.5, 1.3])
def test_edm_s_preconditioning_and_weight_by_hand(data):
    options = {"schedule": "edm", "time_law": "lognormal", "weighting": "edm", "sigma_data": data}
    method = build("denoising", Linear(A, B), X0, **options)
    total, plain = 0.0, 0.0
    rows = zip(edm_levels(method), X0.flatten(1).tolist(), NOISE.flatten(1).tolist(), strict=True)
    for sigma, item, noise in rows:
        both = sigma**2 + data**2
        weight = both / (sigma * data) ** 2
        for x, e in zip(item, noise, strict=True):
            x_t = x + sigma * e
            output = A * x_t / math.sqrt(both) + B * math.log(sigma) / 4
            denoised = data**2 / both * x_t + sigma * data / math.sqrt(both) * output
            total += weight * (denoised - x) ** 2
            # The same in F's own terms, of weight 1 (Karras et al., 2022, equation 8).
            plain += (output - (x - data**2 / both * x_t) * math.sqrt(both) / (sigma * data)) ** 2
    assert total == pytest.approx(plain, rel=1e-9)
    assert float(loss_of(method).loss.detach()) == pytest.approx(total / 12, rel=1e-4)


def test_edm_s_weight_is_that_of_the_network_s_own_scalings():
    known = note_process(Linear(A, B), Process(EDM(), Preconditioned(1.3)))
    continued = build("denoising", known, X0, time_law="lognormal", weighting="edm")
    fresh = build("denoising", Linear(A, B), X0, schedule="edm", time_law="lognormal", weighting="edm", sigma_data=1.3)
    assert torch.equal(loss_of(continued).loss, loss_of(fresh).loss)


def test_truncated_snr_weights_errors_in_x0():
    method = build("denoising", Linear(A, B), X0, schedule="flow", kind="velocity", weighting="truncated-snr")
    total = 0.0
    for t, item, noise in zip(TIMES.tolist(), X0.flatten(1).tolist(), NOISE.flatten(1).tolist(), strict=True):
        for x, e in zip(item, noise, strict=True):
            x_t = (1 - t) * x + t * e
            guess = x_t - t * (A * x_t + B * t)
            total += max(((1 - t) / t) ** 2, 1.0) * (guess - x) ** 2
    assert float(loss_of(method).loss.detach()) == pytest.approx(total / 12, rel=2e-5)


class Analytic(nn.Module):
    """The exact denoiser of a mixture, as a network of one kind of prediction; `scale` undoes the scale of the time."""

    def __init__(self, schedule, kind, scale=1.0, wrong=0.0):
        super().__init__()
        means = torch.tensor([[1.0, 0.5], [-0.6, -0.9], [0.2, -0.4]])
        self.mixture = GaussianMixtureDenoiser(means, 0.4, schedule)
        self.kind, self.scale = kind, scale
        self.wrong = nn.Parameter(torch.tensor(wrong))

    def forward(self, x, time, condition):
        shown = self.mixture(x, (time / self.scale).double())
        return shown.as_kind(self.kind).to(x) + self.wrong


@pytest.mark.parametrize(
    ("name", "schedule", "kind", "scale"),
    [
        ("cosine", Cosine(), "v", 1.0),
        ("flow", FlowMatching(), "velocity", 1.0),
        ("linear", VPDiscrete.named("linear"), "eps", 0.001),
    ],
)
def test_the_exact_denoiser_is_the_minimum(name, schedule, kind, scale):
    """At the minimum the loss is the variance of the target given x_t, and its gradient is 0 in expectation."""
    items = 40_000
    network = Analytic(schedule, kind, scale)
    torch.manual_seed(0)
    x0 = network.mixture.draw(items)
    share = (torch.arange(items) + 0.5) / items
    share = 0.05 + 0.9 * share[torch.randperm(items)]  # where no quotient is large
    draws = Given(items, time=share.float(), noise=torch.randn(items, 2))
    method = build("denoising", network, x0, schedule=name, kind=kind)
    assert method.denoiser.process.parameterisation == Direct(kind, scale)
    best = loss_of(method, draws, x0=x0).loss
    (slope,) = torch.autograd.grad(best, network.wrong)
    assert abs(float(slope)) < 0.02
    # E |target - E[target | x_t]|^2 = factor^2 Var[x0 | x_t], which the mixture's own responsibilities give.
    t = (schedule.t_min + share * (schedule.t_max - schedule.t_min)).double()
    t = (1000 * share.double()).floor() if name == "linear" else t
    x_t = schedule.add_noise(x0, draws.recorded["noise"], t)
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    responsible = network.mixture.posterior(x_t, t)
    gain = alpha * 0.16 / (alpha.square() * 0.16 + sigma.square())
    centres = network.mixture.means + gain[..., None] * (x_t[:, None] - alpha[..., None] * network.mixture.means)
    mean = (responsible[..., None] * centres).sum(1)
    spread = (responsible[..., None] * (centres - mean[:, None]).square()).sum(1)
    variance = spread + 0.16 * sigma.square() / (alpha.square() * 0.16 + sigma.square())
    factor = {"v": 1 / sigma, "velocity": 1 / sigma, "eps": alpha / sigma}[kind]  # d target / d x0 at fixed x_t
    expected = (factor.square() * variance).mean()
    assert float(best.detach()) == pytest.approx(float(expected), rel=0.03)
    worse = build("denoising", Analytic(schedule, kind, scale, wrong=0.3), x0, schedule=name, kind=kind)
    assert float((loss_of(worse, draws, x0=x0).loss - best).detach()) == pytest.approx(0.09, abs=0.01)


class Listening(Linear):
    """Keeps the labels that it was told."""

    def __init__(self):
        super().__init__(A, B)
        self.heard = None

    def forward(self, x, time, condition):
        self.heard = condition.get("label")
        return super().forward(x, time, condition)


def test_the_share_of_items_without_their_condition():
    x0, labels = torch.zeros(4000, 2), torch.arange(4000) % 3
    labels[::5] = -100
    for rate in (0.0, 0.25, 1.0):
        student = Listening()
        method = build("denoising", student, x0, classes=3, condition_dropout=rate)
        only_update(method, images(x0, labels))
        known = labels >= 0
        assert (student.heard[~known] == 3).all()  # items without a class have the null label anyway
        kept = student.heard[known] == labels[known]
        assert (student.heard[known][~kept] == 3).all()
        assert float((~kept).double().mean()) == pytest.approx(rate, abs=0.035)


def test_dropping_is_drawn_by_item_and_apart_from_times_and_noise():
    x0 = torch.zeros(40, 2)
    method = build("denoising", Listening(), x0, classes=3, condition_dropout=0.5)
    labels = torch.arange(40) % 3
    only_update(method, images(x0, labels))
    whole = method.student.heard
    only_update(method, images(x0, labels).select(torch.tensor([30, 2, 17])))
    assert torch.equal(method.student.heard, whole[[30, 2, 17]])
    draws = method.draws(images(x0, labels))
    assert torch.equal(whole == 3, draws.uniform("condition") < 0.5)
    assert not torch.equal(draws.uniform("condition"), draws.uniform("time"))


def test_data_without_classes_say_nothing():
    student = Listening()
    method = build("denoising", student, X0)
    loss_of(method, labels=torch.full((4,), -100))
    assert student.heard is None
    assert method.denoiser.process.null_label is None


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("edm", EDM, Preconditioned(0.7)),
        ("flow", FlowMatching, Direct("velocity")),
        ("trig", TrigFlow, Direct("velocity")),
        ("cosine", Cosine, Direct("velocity")),
        (None, Cosine, Direct("velocity")),
        ("squared-cosine", VPDiscrete, Direct("velocity", 0.001)),
    ],
)
def test_the_process_is_noted_and_saved(name, kind, expected, tmp_path):
    student = DenoisingMLP(numbers=3, classes=4, width=8, depth=1)
    options = {"kind": "velocity", "sigma_data": 0.7, "guidance": 2.0, "steps": 7, "solver": "heun"}
    build("denoising", student, X0, classes=4, schedule=name, **options)
    process = process_of(student)
    assert isinstance(process.schedule, kind)
    assert process.parameterisation == expected
    assert process.sampling == Sampling("heun", 7, 2.0)
    assert process.null_label == 4
    save_model(student, tmp_path)
    assert process_of(load_model(tmp_path)).config() == process.config()


def test_a_process_that_is_known_stays_but_for_its_sampler():
    known = Process(FlowMatching(), Direct("x0", 5.0), Sampling("euler", 3), null_label=9)
    student = note_process(DenoisingMLP(numbers=3, classes=4, width=8, depth=1), known)
    build("denoising", student, X0, classes=4, steps=11)
    kept = process_of(student)
    assert (kept.schedule, kept.parameterisation, kept.null_label) == (known.schedule, Direct("x0", 5.0), 9)
    assert kept.sampling == Sampling("ddim", 11)
    build("denoising", student, X0, classes=4, schedule="edm")
    assert isinstance(process_of(student).schedule, EDM)
    assert process_of(student).null_label == 4


def test_discrete_times_are_whole_and_reach_both_ends():
    class Timed(Linear):
        def forward(self, x, time, condition):
            self.times = time
            return super().forward(x, time, condition)

    x0 = torch.zeros(3, 2)
    student = Timed(A, B)
    method = build("denoising", student, x0, schedule="linear", kind="eps")
    loss_of(method, Given(3, time=torch.tensor([0.0, 0.5, 1 - 2**-24])), x0=x0)
    told = student.times * 1000
    assert told.tolist() == pytest.approx([0, 500, 999])
    assert isinstance(method.denoiser, NetworkDenoiser)
