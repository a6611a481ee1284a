import copy
import json

import pytest
import torch

from limbeck.diffusion.denoiser import (
    Denoiser,
    NetworkDenoiser,
    Process,
    Sampling,
    Transported,
    condition_of,
    denoiser_of,
    note_process,
    process_of,
    usual_time_scale,
)
from limbeck.diffusion.mixture import GaussianMixtureDenoiser
from limbeck.diffusion.parameterisations import Direct, Preconditioned
from limbeck.diffusion.predictions import KINDS
from limbeck.diffusion.schedules import EDM, Cosine, FlowMatching, VPDiscrete
from tests.diffusion.cases import SCHEDULES, Wave, normal, times_of

PROCESSES = [
    Process(Cosine()),
    Process(VPDiscrete.named("scaled-linear"), Direct("v"), Sampling("dpmpp_2m", 20, 7.5), null_label=10),
    Process(EDM(0.01, 50.0), Preconditioned(0.4, True, "250-log"), Sampling("consistency", 2, times=(50.0, 0.8, 0.0))),
    Process(FlowMatching(), Direct("velocity", 1000.0), Sampling("euler", 4), guidance_input=True),
]


@pytest.mark.parametrize("process", PROCESSES)
def test_configs_survive_json(process):
    config = json.loads(json.dumps(process.config()))
    made = Process.from_config(config)
    assert made.config() == process.config()
    assert (made.parameterisation, made.sampling) == (process.parameterisation, process.sampling)
    assert (made.null_label, made.guidance_input) == (process.null_label, process.guidance_input)
    t = times_of(process.schedule)
    assert made.schedule.alpha(t).equal(process.schedule.alpha(t))
    times = process.sampling.times_for(process.schedule)
    assert made.sampling.times_for(made.schedule).equal(times)


GOOD = PROCESSES[2].config()


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": {"name": "sideways"}},
        {"schedule": None},
        {"schedule": "edm"},
        {"parameterisation": {"name": "direct", "kind": "noise"}},
        {"parameterisation": {"name": "direct", "kind": "eps", "time_scale": 0.0}},
        {"parameterisation": {"name": "direct", "kind": "eps", "scale": 1.0}},
        {"parameterisation": {"name": "indirect"}},
        {"parameterisation": {"kind": "eps"}},
        {"parameterisation": None},
        {"parameterisation": {"name": "preconditioned", "sigma_data": -1.0}},
        {"parameterisation": {"name": "preconditioned", "sigma_data": "half"}},
        {"parameterisation": {"name": "preconditioned", "noise": "log"}},
        {"sampling": {"solver": "rk5"}},
        {"sampling": {"steps": 0}},
        {"sampling": {"steps": 2.5}},
        {"sampling": {"steps": "many"}},
        {"sampling": {"guidance": -1.0}},
        {"sampling": {"guidance": float("nan")}},
        {"sampling": {"times": [50.0]}},
        {"sampling": {"times": [1.0, 1.0, 0.0]}},
        {"sampling": {"times": [0.0, 1.0]}},
        {"sampling": {"times": 3}},
        {"sampling": {"speed": 3}},
        {"sampling": 3},
        {"null_label": "none"},
        {"null_label": 2.5},
        {"guidance_input": "yes"},
    ],
)
def test_bad_configs_are_refused(changes):
    with pytest.raises(ValueError, match=r".+"):
        Process.from_config({**GOOD, **changes})


@pytest.mark.parametrize("config", [{}, None, [], "process", {"schedule": GOOD["schedule"]}])
def test_what_is_no_config_is_refused(config):
    with pytest.raises(ValueError, match="no diffusion process"):
        Process.from_config(config)


def test_sampled_in_another_way():
    process = PROCESSES[1].sampled(steps=4, guidance=1.0)
    assert (process.sampling.steps, process.sampling.guidance, process.sampling.solver) == (4, 1.0, "dpmpp_2m")
    assert process.schedule is PROCESSES[1].schedule
    assert PROCESSES[1].sampling.steps == 20
    with pytest.raises(ValueError, match="one step or more"):
        process.sampled(steps=0)


def test_times_of_a_sampler():
    edm = PROCESSES[2]
    assert edm.sampling.times_for(edm.schedule).tolist() == [50.0, 0.8, 0.0]
    assert edm.sampling.times_for(edm.schedule, 2).tolist() == [50.0, 0.8, 0.0]
    assert len(edm.sampling.times_for(edm.schedule, 5)) == 6
    with pytest.raises(ValueError, match="one step or more"):
        edm.sampling.times_for(edm.schedule, 0)


def test_a_noted_process():
    network = torch.nn.Linear(2, 2)
    assert process_of(network) is None
    with pytest.raises(ValueError, match="note its process"):
        NetworkDenoiser(network)
    assert note_process(network, PROCESSES[0]) is network
    assert process_of(network) is PROCESSES[0]
    assert process_of(copy.deepcopy(network)).config() == PROCESSES[0].config()
    assert denoiser_of(network).schedule is PROCESSES[0].schedule
    assert not set(network.state_dict()) - {"weight", "bias"}


def test_denoisers_behind_modules():
    mixture = GaussianMixtureDenoiser.ring(Cosine())
    assert denoiser_of(mixture) is mixture
    assert isinstance(mixture, Denoiser)
    model = NetworkDenoiser(Wave(), PROCESSES[3])
    assert model.guidance_input
    assert Transported(model, Cosine()).guidance_input
    assert Transported(NetworkDenoiser(Wave(), PROCESSES[2]), Cosine()).sampling.times is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_direct_network(name, kind):
    """Its input as it is, its time scaled, its output as the kind it says."""
    schedule, network = SCHEDULES[name], Wave()
    x, t = normal(3, 4), times_of(schedule, 3)
    said = NetworkDenoiser(network, Process(schedule, Direct(kind, time_scale=3.0)))(x, t)
    torch.testing.assert_close(network.asked[0], 3 * t)
    assert said.as_kind(kind).equal(network(x, 3 * t))


@pytest.mark.parametrize("boundary", [False, True])
def test_a_preconditioned_network(boundary):
    """D = c_skip x + c_out F(c_in x, ln(sigma) / 4), written out."""
    network, made = Wave(), Preconditioned(0.5, boundary)
    x, sigma = normal(3, 4), torch.tensor([0.01, 1.0, 70.0]).double()
    said = NetworkDenoiser(network, Process(EDM(), made))(x, sigma)
    above = (sigma - 0.002 if boundary else sigma)[:, None]
    s = sigma[:, None]
    inner = network(x / (s**2 + 0.25).sqrt(), sigma.log() / 4)
    expected = 0.25 / (above**2 + 0.25) * x + 0.5 * above / (s**2 + 0.25).sqrt() * inner
    torch.testing.assert_close(said.x0, expected)


def test_conditions_of_a_batch():
    batch = {"image": normal(3, 2), "label": torch.tensor([4, -100, 1]), "prompt": normal(3, 2, 5)}
    assert condition_of(batch, 10)["label"].tolist() == [4, 10, 1]
    assert condition_of(batch)["label"].tolist() == [4, -100, 1]
    assert condition_of(batch).keys() == {"label", "prompt"}


def test_usual_time_scales():
    own = Wave()
    assert usual_time_scale(own, VPDiscrete.named("linear")) == pytest.approx(0.001)
    assert usual_time_scale(own, FlowMatching()) == 1.0
