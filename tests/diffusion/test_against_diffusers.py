"""Our samplers follow the schedulers of diffusers, step by step, from the same states and with the same noise.

The network is a smooth function of its input and time; states agree within 1e-5 of their largest number.
"""

import numpy
import pytest
import torch

from limbeck.diffusion import grids, solvers
from limbeck.diffusion.consistency import lcm_function
from limbeck.diffusion.denoiser import NetworkDenoiser, Process, Transported
from limbeck.diffusion.parameterisations import Direct, Preconditioned
from limbeck.diffusion.predictions import Prediction
from limbeck.diffusion.schedules import EDM, FlowMatching, TrigFlow, VPDiscrete
from limbeck.diffusion.steps import stochastic_ddim_step
from tests.diffusion.cases import Wave, normal, wave_denoiser

diffusers = pytest.importorskip("diffusers")

TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
START = normal(3, 2, 4, 4, dtype=torch.float32)
NETWORK = Wave()
KINDS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


def agree(ours, theirs):
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs) > 1
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        largest = float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * max(1.0, largest), msg=lambda m: f"{number}: {m}")  # noqa: B023


def their_path(scheduler, network=NETWORK, start=START, **arguments):
    """States after every step, the model called as the pipelines of diffusers do."""
    torch.manual_seed(5)
    x, states = start, []
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = network(seen, t.expand(len(x)))
        x = scheduler.step(output, t, x, return_dict=False, **arguments)[0]
        states.append(x)
    return states


def our_path(solver, model, times, start=START):
    torch.manual_seed(5)
    return list(solver(model, start, torch.as_tensor(times, dtype=torch.float64)))


def ended(timesteps, end):
    return [*map(float, timesteps), float(end)]


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim(spacing, to_one, eta):
    scheduler = diffusers.DDIMScheduler(
        **TABLE,
        clip_sample=False,
        set_alpha_to_one=to_one,
        timestep_spacing=spacing,
        steps_offset=1 if spacing == "leading" else 0,
    )
    scheduler.set_timesteps(10)
    schedule = VPDiscrete.named("scaled-linear")
    grid = grids.leading_times(schedule, 10, offset=1) if spacing == "leading" else grids.uniform_times(schedule, 10)
    assert grid[:-1].tolist() == scheduler.timesteps.tolist()
    assert grid[-1] == -1
    times = ended(scheduler.timesteps, -1 if to_one else 0)

    def solver(model, x, times):
        return solvers.ddim(model, x, times, eta)

    agree(our_path(solver, wave_denoiser(schedule), times), their_path(scheduler, eta=eta))


@pytest.mark.parametrize("kind", KINDS)
def test_ddim_with_given_noise(kind):
    """`variance_noise`, and every kind of prediction."""
    scheduler = diffusers.DDIMScheduler(**TABLE, clip_sample=False, timestep_spacing="trailing", prediction_type=kind)
    scheduler.set_timesteps(4)
    model = wave_denoiser(VPDiscrete.named("scaled-linear"), KINDS[kind])
    x, noise = START, normal(3, 2, 4, 4, seed=9, dtype=torch.float32)
    for t, s in zip(scheduler.timesteps, [*scheduler.timesteps[1:], torch.tensor(-1)], strict=True):
        theirs = scheduler.step(NETWORK(x, t.expand(3)), t, x, eta=0.7, variance_noise=noise, return_dict=False)[0]
        ours = stochastic_ddim_step(model(x, t.expand(3).double()), s.double(), 0.7, noise)
        agree([ours, ours], [theirs, theirs])
        x = theirs


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddpm(spacing):
    scheduler = diffusers.DDPMScheduler(**TABLE, clip_sample=False, timestep_spacing=spacing)
    scheduler.set_timesteps(20)
    times = ended(scheduler.timesteps, -1)
    agree(our_path(solvers.ancestral, wave_denoiser(VPDiscrete.named("scaled-linear")), times), their_path(scheduler))


def test_ddpm_of_all_steps():
    """The sampler of the paper, on the linear table."""
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=50, beta_start=1e-4, beta_end=0.02, clip_sample=False)
    scheduler.set_timesteps(50)
    schedule = VPDiscrete.named("linear", 50)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), schedule.alphas_cumprod, rtol=1e-6, atol=0)
    scheduler.alphas_cumprod = schedule.alphas_cumprod  # theirs, in float32, lose digits close to 1
    model = wave_denoiser(schedule)
    agree(our_path(solvers.ancestral, model, range(49, -2, -1)), their_path(scheduler))


@pytest.mark.parametrize(("algorithm", "order"), [("dpmsolver++", 1), ("dpmsolver++", 2), ("sde-dpmsolver++", 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_dpm_solver(algorithm, order, kind):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **TABLE, algorithm_type=algorithm, solver_order=order, prediction_type=kind
    )
    scheduler.set_timesteps(12)
    solver = {"sde-dpmsolver++": solvers.sde}.get(algorithm, solvers.dpmpp_2m if order == 2 else solvers.ddim)
    model = wave_denoiser(VPDiscrete.named("scaled-linear"), KINDS[kind])
    agree(our_path(solver, model, ended(scheduler.timesteps, -1)), their_path(scheduler))


def in_sigmas(kind="eps"):
    """A network of discrete times, asked in EDM's noise levels: how the k-diffusion samplers use it."""
    return Transported(wave_denoiser(VPDiscrete.named("scaled-linear"), kind), EDM())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("name", "solver"),
    [
        ("EulerDiscreteScheduler", solvers.euler),
        ("HeunDiscreteScheduler", solvers.heun),
        ("EulerAncestralDiscreteScheduler", solvers.ancestral),
    ],
)
def test_samplers_in_sigmas(name, solver, kind):
    scheduler = getattr(diffusers, name)(**TABLE, timestep_spacing="trailing", prediction_type=kind)
    scheduler.set_timesteps(10)
    times = scheduler.sigmas.double()
    start = 14 * START
    theirs = their_path(scheduler, start=start)
    if solver is solvers.heun:  # theirs makes two steps of one
        times, theirs = torch.cat([times[:1], times[1::2]]), [*theirs[1::2], theirs[-1]]
    assert len(times) == 11
    agree(our_path(solver, in_sigmas(KINDS[kind]), times, start), theirs)


def test_ddim_is_euler_in_sigmas():
    """The same states but for the scale: no scheduler at all."""
    schedule = VPDiscrete.named("scaled-linear")
    times = grids.uniform_times(schedule, 8)
    one = our_path(solvers.ddim, wave_denoiser(schedule), times)
    sigmas = schedule.sigma(times) / schedule.alpha(times)
    other = our_path(solvers.euler, in_sigmas(), sigmas, START / schedule.alpha(times[0]).float())
    agree([x / a.float() for x, a in zip(one, schedule.alpha(times[1:]), strict=True)], other)


@pytest.mark.parametrize(
    ("name", "solver"), [("EDMEulerScheduler", solvers.euler), ("EDMDPMSolverMultistepScheduler", solvers.dpmpp_2m)]
)
def test_edm(name, solver):
    scheduler = getattr(diffusers, name)(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    scheduler.set_timesteps(12)
    network = Wave(period=10.0)
    times = grids.usual_times(EDM(), 12)
    torch.testing.assert_close(times.float(), scheduler.sigmas, rtol=1e-5, atol=1e-7)
    model = NetworkDenoiser(network, Process(EDM(), Preconditioned(0.5)))
    agree(our_path(solver, model, scheduler.sigmas, 80 * START), their_path(scheduler, network, 80 * START))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching(shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    even = numpy.linspace(1.0, 0.1, 10)
    scheduler.set_timesteps(sigmas=even.tolist())
    times = grids.shifted(grids.uniform_times(FlowMatching(), 10), shift)
    torch.testing.assert_close(times.float(), scheduler.sigmas)
    model = NetworkDenoiser(NETWORK, Process(FlowMatching(), Direct("velocity", time_scale=1000.0)))
    theirs = their_path(scheduler)
    agree(our_path(solvers.euler, model, scheduler.sigmas), theirs)
    agree(our_path(solvers.ddim, model, scheduler.sigmas), theirs)


@pytest.mark.parametrize("steps", range(1, 51))
def test_grids_of_latent_consistency(steps):
    """All numbers of steps: rounding down must not slip."""
    scheduler = diffusers.LCMScheduler(**TABLE)
    scheduler.set_timesteps(steps, original_inference_steps=50)
    schedule = VPDiscrete.named("scaled-linear")
    assert grids.lcm_times(schedule, steps).tolist() == [*scheduler.timesteps.tolist(), -1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [2, 4, 8])
def test_latent_consistency(kind, steps):
    scheduler = diffusers.LCMScheduler(**TABLE, clip_sample=False, prediction_type=kind)
    scheduler.set_timesteps(steps, original_inference_steps=50)
    denoiser = wave_denoiser(VPDiscrete.named("scaled-linear"), KINDS[kind])

    def model(x, t):
        said = denoiser(x, t)
        return Prediction(lcm_function(said), "x0", x, t, said.schedule)

    times = grids.lcm_times(denoiser.schedule, steps)
    agree(our_path(solvers.consistency, model, times), their_path(scheduler))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_tcd(eta, kind):
    scheduler = diffusers.TCDScheduler(**TABLE, clip_sample=False, prediction_type=kind)
    scheduler.set_timesteps(4, original_inference_steps=50)
    model = wave_denoiser(VPDiscrete.named("scaled-linear"), KINDS[kind])

    def solver(model, x, times):
        return solvers.tcd(model, x, times, eta)

    agree(our_path(solver, model, ended(scheduler.timesteps, 0)), their_path(scheduler, eta=eta))


@pytest.mark.parametrize("steps", [2, 4])
def test_scm(steps):
    """Their states are 0.5 times ours; the network gives their 0.5 F."""
    scheduler = diffusers.SCMScheduler(sigma_data=0.5)
    scheduler.set_timesteps(steps, max_timesteps=1.57080, intermediate_timesteps=1.3 if steps == 2 else None)
    times = grids.scm_times(steps)
    torch.testing.assert_close(times.float(), scheduler.timesteps)
    network = Wave(period=1.0)
    torch.manual_seed(5)
    x, theirs = 0.5 * START, []
    for t in scheduler.timesteps[:-1]:
        x = scheduler.step(0.5 * network(x / 0.5, t.expand(3)), t, x, return_dict=False)[0]
        theirs.append(x)
    model = NetworkDenoiser(network, Process(TrigFlow(), Direct("v")))
    agree([0.5 * x for x in our_path(solvers.consistency, model, times)], theirs)


def test_consistency_models():
    scheduler = diffusers.CMStochasticIterativeScheduler(clip_denoised=False)
    scheduler.set_timesteps(5)
    process = Process(EDM(), Preconditioned(0.5, boundary=True, noise="250-log"))
    network = Wave()

    def solver(model, x, times):
        return solvers.consistency(model, x, times, lands_at=0.002)

    ours = our_path(solver, NetworkDenoiser(network, process), scheduler.sigmas, 80 * START)
    agree(ours, their_path(scheduler, network, 80 * START))


def test_a_flow_with_renoising():
    """FlowMatchLCMScheduler: x = (1 - s) x0 + s n."""
    scheduler = diffusers.FlowMatchLCMScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    model = NetworkDenoiser(NETWORK, Process(FlowMatching(), Direct("velocity", time_scale=1000.0)))
    torch.manual_seed(5)
    ours = list(solvers.consistency(model, START, scheduler.sigmas.double()))
    agree(ours, their_path(scheduler))
