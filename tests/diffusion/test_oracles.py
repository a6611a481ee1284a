"""Against numbers recorded from the original code; see tests/oracles."""

import math

import pytest
import torch

from limbeck.diffusion import consistency, grids, steps
from limbeck.diffusion.denoiser import NetworkDenoiser, Process, Transported
from limbeck.diffusion.embeddings import scalar_embedding
from limbeck.diffusion.parameterisations import Direct, Preconditioned
from limbeck.diffusion.predictions import Prediction, convert
from limbeck.diffusion.schedules import EDM, FlowMatching, TrigFlow, VPDiscrete, along
from limbeck.diffusion.solvers import tcd
from tests.oracles.oracle import load

(FOUNDATIONS,) = load("foundations_conversions")
(SCOTT,) = load("scott_sde_solvers")
(HYPER,) = load("hyper-sd")
(MLCM,) = load("mlcm")
(SANA,) = load("sana-sprint")
(ICT,) = load("ict")
(GUIDED,) = load("guided-distillation")

FAMILIES = {"edm": EDM(), "rf": FlowMatching(), "trig": TrigFlow()}


@pytest.mark.parametrize("family", FAMILIES)
def test_foundations(family):
    schedule, case = FAMILIES[family], FOUNDATIONS
    x0, eps, t = case.inputs["x0"], case.inputs["eps"], case.inputs[f"{family}_t"]
    case.check(f"{family}_alpha", schedule.alpha(t))
    case.check(f"{family}_sigma", schedule.sigma(t))
    x_t = schedule.add_noise(x0, eps, t)
    case.check(f"{family}_xt", x_t)
    case.check(f"{family}_flow", convert(x0, "x0", "velocity", x_t, t, schedule), rtol=1e-7)
    case.check(f"{family}_x0_to_eps", convert(0.9 * x0, "x0", "eps", x_t, t, schedule))
    case.check(f"{family}_eps_to_x0", convert(0.9 * eps, "eps", "x0", x_t, t, schedule))
    case.check(f"{family}_x0_to_flow", convert(0.9 * x0, "x0", "velocity", x_t, t, schedule))
    case.check(f"{family}_flow_to_x0", convert(0.5 * eps, "velocity", "x0", x_t, t, schedule))


@pytest.mark.parametrize("t", [961, 481, 1])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_scotts_stochastic_ddim(t, eta):
    case, schedule = SCOTT, VPDiscrete(SCOTT.inputs["alphas_cumprod"])
    times = torch.full((2,), float(t))
    prediction = Prediction(case.inputs["eps"], "eps", case.inputs["x"], times, schedule)
    case.check(f"ddim_x0_t{t}", prediction.x0)
    lower = torch.tensor(max(t - 20, 0), dtype=torch.float64)
    case.check(
        f"ddim_t{t}_eta{eta}", steps.stochastic_ddim_step(prediction, lower, eta, case.inputs["noise"]), atol=1e-6
    )


@pytest.mark.parametrize(("algorithm", "eta"), [("dpmsolver++", 0.0), ("sde-dpmsolver++", 1.0)])
def test_scotts_sde_solver(algorithm, eta):
    case, schedule = SCOTT, VPDiscrete(SCOTT.inputs["alphas_cumprod"])
    x, times = case.inputs["x"], case.outputs["dpm_timesteps"].double()
    ratio = schedule.sigma(times) / schedule.alpha(times)
    case.check("dpm_sigmas", torch.cat([ratio, torch.zeros(1).double()]))
    for number in range(3):
        prediction = Prediction(case.inputs["eps"], "eps", x, times[number].expand(2), schedule)
        x = steps.sde_step(prediction, times[number + 1], eta, case.inputs["noise"])
        case.check(f"{algorithm}_x{number}", x, atol=1e-5)


@pytest.mark.parametrize("case", [MLCM, HYPER], ids=["mlcm", "hyper-sd"])
@pytest.mark.parametrize("segments", [1, 2, 4, 8])
def test_segment_ends(case, segments):
    schedule = VPDiscrete(case.inputs["alphas_cumprod"])
    grid = grids.lcm_grid(schedule, 50)
    end = consistency.segment_end(case.inputs["index"], 50, segments)
    time = torch.where(end < 0, 0.0, grid[end])
    case.check(f"t_end_M{segments}", time.long())
    start = grid[case.inputs["index"]]
    x0, eps = case.inputs["pred_x0"].double(), case.inputs["pred_eps"].double()
    prediction = Prediction(x0, "x0", schedule.add_noise(x0, eps, start), start, schedule)
    case.check(f"x_end_M{segments}", steps.ddim_step(prediction, time), atol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_hyper_sds_sampler(gamma):
    case, schedule = HYPER, VPDiscrete(HYPER.inputs["alphas_cumprod"])
    times = grids.lcm_times(schedule, 4)[:4]
    case.check("tcd_timesteps", times.long())
    said = iter(case.inputs[f"tcd_mo{n}"] for n in range(4))

    def model(x, t):
        return Prediction(next(said), "eps", x, t, schedule)

    path = tcd(model, case.inputs["tcd_x"], torch.cat([times, torch.zeros(1).double()]), gamma)
    with steps.drawing_from(lambda x: case.inputs["tcd_noise"].to(x)):
        states = list(path)
    for number, state in enumerate(states):
        case.check(f"tcd_eta{gamma}_x{number}", state, atol=1e-4)
    assert len(states) == 4


def test_sanas_trig_flow():
    case, schedule = SANA, TrigFlow()
    x0, eps, t = case.tensors["x0"], case.tensors["eps"], case.tensors["t"]
    x_t = schedule.add_noise(x0, eps, t)
    case.check("trig_xt", x_t, rtol=1e-9)
    v = convert(x0, "x0", "v", x_t, t, schedule)
    case.check("trig_v", v, rtol=1e-9, atol=1e-12)
    case.check("trig_x0_from_v", convert(v, "v", "x0", x_t, t, schedule), rtol=1e-9)
    torch.testing.assert_close(0.5 * schedule.sigma(t) / schedule.alpha(t), case.tensors["sigma"], rtol=1e-9, atol=0)


def test_sanas_wrapper_is_a_transport():
    case = SANA
    seen = []

    class Recorded(torch.nn.Module):
        def forward(self, x, time, condition):
            seen.append((x, time))
            return case.tensors["wrap_flow_v"]

    flow = NetworkDenoiser(Recorded(), Process(FlowMatching(), Direct("velocity")))
    said = Transported(flow, TrigFlow())(case.tensors["wrap_x"], case.tensors["wrap_t"])
    case.check("wrap_trig_out", said.v, rtol=1e-4, atol=1e-6)
    ((x, time),) = seen
    case.check("wrap_flow_in", x, rtol=1e-4, atol=1e-6)
    case.check("wrap_flow_t", time, rtol=1e-5)


def test_sanas_times():
    """t = atan(exp(mean + std z) / 0.5): the lognormal law of sigma / alpha, for data of deviation 0.5."""
    case, z = SANA, SANA.tensors["ts_z"].double()
    for name, mean, std in (("ts_t_gen", 0.2, 1.6), ("ts_t_disc", -0.6, 1.0)):
        case.check(name, TrigFlow().time_of(-(mean + std * z - math.log(0.5))), rtol=1e-4)


def test_sanas_sampler():
    """Its states and noise have deviation 0.5: ours are in units of that."""
    case, schedule = SANA, TrigFlow()
    times = grids.scm_times(2)
    case.check("sch_timesteps", times, rtol=1e-6)
    x = case.tensors["sch_x"] / 0.5
    for number in (1, 2):
        output = case.tensors[f"sch_mo{number}"] / 0.5
        prediction = Prediction(output, "v", x, times[number - 1].expand(2), schedule)
        case.check(f"sch_den{number}", 0.5 * prediction.x0, rtol=1e-4, atol=1e-6)
        x = steps.renoise(prediction.x0, times[number], schedule, case.tensors["sch_noise"])
        case.check(f"sch_prev{number}", 0.5 * x, rtol=1e-4, atol=1e-6)


def test_icts_curriculum():
    case = ICT
    asked = list(zip(case.tensors["sched_k"].tolist(), case.tensors["sched_K"].tolist(), strict=True))
    case.check("sched_N", torch.tensor([consistency.doubling_scales(k, steps) for k, steps in asked]), rtol=0)
    case.check("sched_N_cm", torch.tensor([consistency.root_scales(k, steps) for k, steps in asked]), rtol=0)


@pytest.mark.parametrize("points", [11, 41])
def test_icts_grid(points):
    case, sigmas = ICT, grids.karras_times(points, rising=True)
    case.check(f"sigmas_{points}", sigmas)
    case.check(f"weights_{points}", 1 / sigmas.diff())
    case.check(f"pdf_{points}", consistency.lognormal_interval_weights(sigmas))


def test_icts_scalings():
    case, sigma = ICT, ICT.inputs["scal_sigma"]
    for name, made in (("cm", Preconditioned(0.5, boundary=True)), ("edm", Preconditioned(0.5))):
        c_skip, c_out = made.scalings(sigma, EDM())
        case.check(f"{name}_c_skip", c_skip)
        case.check(f"{name}_c_out", c_out)
        seen, _ = made.inputs(torch.ones_like(sigma)[:, None], sigma, EDM())
        case.check(f"{name}_c_in", seen[:, 0])


def test_icts_elementwise_pseudo_huber():
    """Recorded number by number: each as an item of its own."""
    x, y = ICT.inputs["ph_x"], ICT.inputs["ph_y"]
    c = 0.00054 * math.sqrt(x[0].numel())
    ours = consistency.pseudo_huber(x.reshape(-1, 1), y.reshape(-1, 1), c, "elementwise").view_as(x)
    ICT.check("ph_elem", ours, atol=1e-7)
    means = consistency.pseudo_huber(x, y, c, "elementwise")
    torch.testing.assert_close(means, ICT.outputs["ph_elem"].flatten(1).mean(1))


class Toy(torch.nn.Module):
    """F(x, c) = a x + b c, as in the recordings."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(torch.tensor(value)) for value in (a, b))

    def forward(self, x, time, condition):
        return self.a * x + self.b * time[:, None, None, None]


def toy(a, b, boundary):
    return NetworkDenoiser(Toy(a, b), Process(EDM(), Preconditioned(0.5, boundary, "250-log")))


@pytest.mark.parametrize("weighting", ["uniform", "karras"])
def test_consistency_training_of_openai(weighting):
    case = ICT
    student, target = toy(0.7, 0.05, True), toy(0.6, -0.02, True)
    falling = grids.karras_times(int(case.inputs["ct_num_scales"]))
    high, low = falling[case.inputs["ct_idx"]], falling[case.inputs["ct_idx"] + 1]
    x0, noise = case.inputs["ct_x0"], case.inputs["ct_noise"]
    online = student(x0 + along(high, x0) * noise, high).x0
    wanted = target(x0 + along(low, x0) * noise, low).x0.detach()
    weight = 1.0 if weighting == "uniform" else high**-2 + 4
    loss = weight * consistency.squared_distance(online, wanted)
    case.check(f"ct_loss_{weighting}", loss)
    slopes = torch.autograd.grad(loss.mean(), list(student.network.parameters()))
    case.check(f"ct_grad_a_{weighting}", slopes[0])
    case.check(f"ct_grad_b_{weighting}", slopes[1])


def test_consistency_distillation_of_openai():
    """The pair is a Heun step of the teacher."""
    case = ICT
    student, target, teacher = toy(0.7, 0.05, True), toy(0.6, -0.02, True), toy(0.5, 0.01, False)
    falling = grids.karras_times(int(case.inputs["ct_num_scales"]))
    high, low = falling[case.inputs["ct_idx"]], falling[case.inputs["ct_idx"] + 1]
    x0, noise = case.inputs["ct_x0"], case.inputs["ct_noise"]
    x_high = x0 + along(high, x0) * noise
    now = teacher(x_high, high)
    x_low = steps.heun_step(now, teacher(steps.euler_step(now, low), low), low)
    loss = consistency.squared_distance(student(x_high, high).x0, target(x_low, low).x0.detach())
    case.check("cd_loss", loss)
    slopes = torch.autograd.grad(loss.mean(), list(student.network.parameters()))
    case.check("cd_grad_a", slopes[0])
    case.check("cd_grad_b", slopes[1])


def test_progressive_distillation_of_openai():
    case, schedule = GUIDED, EDM()
    student, teacher = toy(0.7, 0.05, False), toy(0.5, 0.01, False)
    count, index = int(case.inputs["num_scales"]), case.inputs["idx"]
    fine = grids.karras_times(2 * count + 1)
    t, between, s = fine[2 * index], fine[2 * index + 1], fine[2 * index + 2]
    x0, noise = case.inputs["x0"], case.inputs["noise"]
    x_t = schedule.add_noise(x0, noise, t)
    halfway = steps.euler_step(teacher(x_t, t), between)
    x_s = steps.euler_step(teacher(halfway, between), s)
    target = steps.ddim_target(x_t, t, x_s, s, schedule).detach()
    weight = (1 / t.square()).clamp(min=1)
    loss = weight * consistency.squared_distance(student(x_t, t).x0, target)
    case.check("pd_loss", loss)
    slopes = torch.autograd.grad(loss.mean(), list(student.network.parameters()))
    case.check("pd_grad_a", slopes[0])
    case.check("pd_grad_b", slopes[1])


@pytest.mark.parametrize("dim", [512, 33])
def test_guidance_embedding(dim):
    GUIDED.check(f"w_emb_{dim}", scalar_embedding(GUIDED.inputs["w"], dim), rtol=0, atol=1e-3)
