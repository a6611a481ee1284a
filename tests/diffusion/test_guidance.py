import pytest
import torch

from limbeck.diffusion.denoiser import NetworkDenoiser, Process
from limbeck.diffusion.generation import count_evaluations, generate, guided_model
from limbeck.diffusion.guidance import combine, g_from_w, guided
from limbeck.diffusion.mixture import GaussianMixtureDenoiser
from limbeck.diffusion.parameterisations import Direct
from limbeck.diffusion.predictions import KINDS, Prediction
from limbeck.diffusion.schedules import EDM, Cosine, FlowMatching
from tests.diffusion.cases import SCHEDULES, normal, times_of


class Conditional(torch.nn.Module):
    """A network with classes; counts how often it is asked, and about how many items."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(normal(4, 3, seed=8))
        self.asked = []

    def forward(self, x, time, condition):
        self.asked.append(len(x))
        return torch.tanh(x + time[:, None] + self.table[condition["label"]])


def denoiser(schedule=None, kind="eps"):
    return NetworkDenoiser(Conditional(), Process(schedule or Cosine(), Direct(kind), null_label=3))


LABEL = {"label": torch.tensor([0, 1, 2, 0])}
X = normal(4, 3)
T = times_of(Cosine(), 4)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 7.5, torch.tensor([0.0, 1.0, 3.0, 7.5])])
def test_one_call_equals_two(scale):
    model = denoiser()
    with_it, without = model(X, T, LABEL).value, model(X, T, model.null(LABEL)).value
    model.network.asked.clear()
    got = guided(model, X, T, LABEL, scale).value
    assert model.network.asked == ([4] if isinstance(scale, float) and scale == 1 else [8])
    g = scale[:, None] if isinstance(scale, torch.Tensor) else scale
    torch.testing.assert_close(got, without + g * (with_it - without))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
def test_guidance_is_the_same_for_every_kind(name, kind):
    """pred_u + g (pred_c - pred_u), in whatever the two are expressed."""
    schedule = SCHEDULES[name]
    model, t = GaussianMixtureDenoiser.ring(schedule, classes=2).double(), times_of(schedule, 4)
    x_t, label = schedule.add_noise(normal(4, 2), normal(4, 2, seed=1), t), {"label": torch.tensor([0, 1, 1, 0])}
    plus, minus = (model(x_t, t, condition).as_kind(kind) for condition in (label, model.null(label)))
    got = guided(model, x_t, t, label, 3.0).as_kind(kind)
    torch.testing.assert_close(got, minus + 3.0 * (plus - minus), rtol=1e-7, atol=1e-6)


def test_without_a_condition_there_is_one_call():
    class Plain(torch.nn.Module):
        def forward(self, x, time, condition):
            assert not condition
            return x

    model = NetworkDenoiser(Plain(), Process(Cosine()))
    assert guided(model, X, T, {}, 5.0).value.equal(X)


def test_several_terms_in_one_call():
    """base + sum of scale (plus - minus), each distinct condition asked once."""
    model = denoiser()
    other, null = {"label": torch.tensor([1, 2, 0, 2])}, model.null(LABEL)
    a, b, n = (model(X, T, condition).value for condition in (LABEL, other, null))
    model.network.asked.clear()
    got = combine(model, X, T, [(2.0, LABEL, null), (torch.tensor([1.0, 0.0, -1.0, 0.5]), other, null)])
    assert model.network.asked == [12]
    weight = torch.tensor([1.0, 0.0, -1.0, 0.5])[:, None]
    torch.testing.assert_close(got.value, n + 2 * (a - n) + weight * (b - n))
    classifier_only = combine(model, X, T, [(7.0, LABEL, null)], base=LABEL)
    torch.testing.assert_close(classifier_only.value, a + 7 * (a - n))
    assert got.kind == "eps"
    assert got.x_t is X


def test_conditions_of_one_call_hold_the_same_names():
    """Else a condition would be left out of the batch without a word."""
    model = denoiser()
    with pytest.raises(ValueError, match="same names"):
        combine(model, X, T, [(2.0, LABEL, model.null(LABEL))], base={})


def test_guidance_has_gradients():
    model = denoiser()
    guided(model, X, T, LABEL, 3.0).x0.sum().backward()
    assert model.network.table.grad.abs().sum() > 0


def test_g_from_w():
    assert g_from_w(0.0) == 1.0
    assert g_from_w(7.0) == 8.0
    assert g_from_w(torch.tensor([0.0, 2.5])).tolist() == [1.0, 3.5]


def test_networks_without_a_null_label_cannot_be_guided():
    model = NetworkDenoiser(Conditional(), Process(Cosine()))
    with pytest.raises(ValueError, match="no label that says nothing"):
        guided(model, X, T, LABEL, 2.0)
    assert guided(model, X, T, LABEL, 1.0).value.shape == (4, 3)


def test_generation_is_guided_and_counted():
    model = denoiser(FlowMatching(), "velocity")
    samples = generate(model, X, LABEL, steps=5, guidance=2.0, solver="heun")
    assert model.network.asked == [8] * 9
    assert samples.shape == X.shape
    assert count_evaluations(model, LABEL, 5, guidance=2.0) == 10
    assert count_evaluations(model, LABEL, 5) == 5
    assert not samples.allclose(generate(model, X, LABEL, steps=5, solver="heun"))


def test_networks_that_take_the_scale_are_told_it():
    told = []

    class Told(torch.nn.Module):
        def forward(self, x, time, condition):
            told.append(condition["guidance"])
            return x

    model = NetworkDenoiser(Told(), Process(Cosine(), Direct("eps"), guidance_input=True))
    said = guided_model(model, LABEL, 4.5)(X, T)
    assert isinstance(said, Prediction)
    assert told[0].tolist() == [4.5] * 4
    assert count_evaluations(model, LABEL, 5, guidance=4.5) == 5


def test_generation_starts_at_the_scale_of_the_schedule():
    """Samples of an analytic denoiser under EDM, from standard normal noise."""
    model = GaussianMixtureDenoiser.ring(EDM(), classes=2)
    torch.manual_seed(0)
    noise = torch.randn(400, 2)
    label = {"label": torch.zeros(400, dtype=torch.int64)}
    drawn = generate(model, noise, label, steps=40, solver="heun")
    assert (model.labels[model.label_of(drawn)] == 0).float().mean() > 0.99
    assert ((drawn - model.means[model.label_of(drawn)]).norm(dim=1) < 0.5).float().mean() > 0.98
