import pytest
import torch

from limbeck.diffusion.denoiser import Denoiser, NetworkDenoiser, Process, Sampling, note_process
from limbeck.diffusion.editing import edit, encode, inpaint, restyle
from limbeck.diffusion.generation import generate
from limbeck.diffusion.mixture import GaussianMixtureDenoiser
from limbeck.diffusion.parameterisations import Direct
from limbeck.diffusion.predictions import Prediction
from limbeck.diffusion.schedules import EDM, Cosine, FlowMatching, TrigFlow
from limbeck.models.denoising_mlp import DenoisingMLP

SCHEDULES = [Cosine(), EDM(), FlowMatching(), TrigFlow()]


class Constant(Denoiser):
    """Always predicts the same data, and counts how often it was asked, and where."""

    def __init__(self, schedule, x0, steps=4):
        self.schedule, self.x0, self.sampling, self.asked = schedule, x0, Sampling("ddim", steps), []

    def __call__(self, x_t, t, condition=()):
        self.asked.append(float(t[0]))
        return Prediction(self.x0.to(x_t), "x0", x_t, t, self.schedule)

    def null(self, condition):
        return condition


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_encoding_and_decoding_a_constant_prediction_is_the_identity(schedule):
    data = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).double()
    model = Constant(schedule, data)
    noise = encode(model, data, steps=4)
    assert len(model.asked) == 4
    assert (torch.tensor(model.asked).diff() > 0).all()
    torch.testing.assert_close(generate(model, noise), data, rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", [Cosine(), FlowMatching(), TrigFlow()], ids=lambda s: type(s).__name__)
def test_many_steps_of_encoding_are_undone_by_generation(schedule):
    torch.manual_seed(0)
    mixture = GaussianMixtureDenoiser.ring(schedule, std=0.3).double()
    data = mixture.draw(64)
    noise = encode(mixture, data, steps=400)
    assert noise.std() == pytest.approx(1.0, abs=0.15)
    again = generate(mixture, noise, steps=400)
    assert (again - data).square().mean() < 0.01 * data.var()


def test_edm_encodes_to_standard_noise():
    torch.manual_seed(0)
    mixture = GaussianMixtureDenoiser.ring(EDM(), std=0.3).double()
    assert encode(mixture, mixture.draw(256), steps=100).std() == pytest.approx(1.0, abs=0.15)


def test_restyling_draws_from_the_decoders_model():
    torch.manual_seed(0)
    here = GaussianMixtureDenoiser(torch.tensor([[-2.0, 0.0]]), 0.5, Cosine()).double()
    there = GaussianMixtureDenoiser(torch.tensor([[3.0, 1.0]]), 0.1, Cosine()).double()
    moved = restyle(here, there, here.draw(500))
    torch.testing.assert_close(moved.mean(0), torch.tensor([3.0, 1.0]).double(), atol=0.05, rtol=0)
    assert moved.std(0).max() < 0.2


def test_an_edit_keeps_less_the_more_steps_are_redone():
    torch.manual_seed(0)
    mixture = GaussianMixtureDenoiser.ring(Cosine()).double()
    data, noise = mixture.draw(500), torch.randn(500, 2).double()
    distances = []
    for redone in (2, 6, 10):
        edited = edit(mixture, data, noise, {}, redone=redone, steps=10)
        distances.append(float((edited - data).square().mean()))
    assert distances[0] < 0.2 < 1 < distances[2]
    assert distances == sorted(distances)


def test_an_edit_takes_the_last_steps_of_the_grid():
    model = Constant(FlowMatching(), torch.zeros(3, 2))
    edit(model, torch.ones(3, 2), torch.zeros(3, 2), {}, redone=2)
    assert model.asked == [0.5, 0.25]
    seen = []

    class Listening(Constant):
        def __call__(self, x_t, t, condition=()):
            seen.append(x_t)
            return super().__call__(x_t, t, condition)

    edit(Listening(FlowMatching(), torch.zeros(3, 2)), torch.ones(3, 2), torch.full((3, 2), 3.0), {}, redone=1)
    torch.testing.assert_close(seen[0], torch.full((3, 2), 0.75 + 0.25 * 3))  # (1 - t) x + t noise at t = 1/4


@pytest.mark.parametrize("redone", [0, 5])
def test_an_edit_redoes_steps_that_there_are(redone):
    model = Constant(FlowMatching(), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="redoes"):
        edit(model, torch.ones(3, 2), torch.zeros(3, 2), {}, redone=redone)


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp_2m", "stochastic_progressive"])
def test_inpainting_keeps_what_is_known_and_fills_in_what_fits(solver):
    torch.manual_seed(0)
    # Two modes on the diagonal: the first coordinate tells the second.
    means = torch.tensor([[-1.5, -1.5], [1.5, 1.5]])
    mixture = GaussianMixtureDenoiser(means, 0.1, Cosine()).double()
    known = mixture.draw(200)
    mask = torch.tensor([[1.0, 0.0]]).double()
    noise = torch.randn(200, 2).double()
    filled = inpaint(mixture, known, mask, noise, steps=50, solver=solver, fresh=True)
    assert torch.equal(filled[:, 0], known[:, 0])
    assert ((filled[:, 1] > 0) == (known[:, 0] > 0)).double().mean() > 0.95
    unguided = generate(mixture, noise, steps=50, solver=solver)
    assert ((unguided[:, 1] > 0) == (known[:, 0] > 0)).double().mean() < 0.7


def test_inpainting_is_a_function_of_its_noise_unless_fresh():
    torch.manual_seed(0)
    mixture = GaussianMixtureDenoiser.ring(Cosine()).double()
    known, noise, mask = mixture.draw(8), torch.randn(8, 2).double(), torch.tensor([[1.0, 0.0]]).double()
    first = inpaint(mixture, known, mask, noise)
    assert torch.equal(first, inpaint(mixture, known, mask, noise))
    assert not torch.equal(first, inpaint(mixture, known, mask, noise, fresh=True))
    assert torch.equal(inpaint(mixture, known, torch.ones(8, 2).double(), noise), known)
    assert torch.equal(inpaint(mixture, known, torch.zeros(8, 2).double(), noise), generate(mixture, noise))


def test_a_network_sees_further_channels():
    """The condition `channels` comes after those of the items, and the output has the items' shape."""

    class Seeing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one = torch.nn.Parameter(torch.ones(()))

        def forward(self, x, time, condition):
            assert x.shape == (2, 5, 4, 4)
            return self.one * x[:, :1] + 10 * x[:, 1:2]

    denoiser = NetworkDenoiser(Seeing(), Process(FlowMatching(), Direct("x0")))
    items, further = torch.ones(2, 1, 4, 4), torch.full((2, 4, 4, 4), 2.0)
    assert denoiser(items, torch.tensor([0.5, 0.5]), {"channels": further}).x0.unique().tolist() == [21.0]


def test_guided_students_are_told_the_scale_of_an_edit():
    torch.manual_seed(0)
    student = DenoisingMLP(numbers=2, classes=2, width=8, depth=1, guidance=True)
    torch.nn.init.normal_(student.guidance.weight)
    note_process(student, Process(Cosine(), Direct("v"), Sampling("ddim", 4, 3.0), guidance_input=True))
    denoiser = NetworkDenoiser(student)
    data, noise, labels = torch.randn(4, 2), torch.randn(4, 2), {"label": torch.tensor([0, 1, 0, 1])}
    with torch.no_grad():
        default = edit(denoiser, data, noise, labels, redone=2)
        assert torch.equal(default, edit(denoiser, data, noise, labels, redone=2, guidance=3.0))
        assert not torch.equal(default, edit(denoiser, data, noise, labels, redone=2, guidance=1.0))
        assert not torch.equal(encode(denoiser, data, labels), encode(denoiser, data, labels, guidance=3.0))
