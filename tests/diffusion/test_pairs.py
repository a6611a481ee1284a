"""Pairs of noise and data, the bank that keeps them, stacked networks and decoders."""

import pytest
import torch
from torch import Tensor, nn

from limbeck.diffusion.decoding import decoder_of, note_decoder
from limbeck.diffusion.denoiser import NetworkDenoiser, Process, Sampling, note_process
from limbeck.diffusion.generation import generate
from limbeck.diffusion.mixture import GaussianMixtureDenoiser
from limbeck.diffusion.pairs import PairBank, PairSampling, endpoints
from limbeck.diffusion.parameterisations import Direct
from limbeck.diffusion.rectified import rectified_euler
from limbeck.diffusion.schedules import Cosine, FlowMatching
from limbeck.diffusion.stacked import Stacked
from limbeck.models.denoising_mlp import DenoisingMLP
from limbeck.models.saved import load_model, save_model
from limbeck.models.stacked import StackedDenoiser
from tests.diffusion.cases import normal


def flow_network(seed: int = 0, classes: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    network = DenoisingMLP(numbers=4, classes=classes, width=16, depth=1)
    return note_process(network, Process(FlowMatching(), Direct("velocity"), Sampling("euler", 8), null_label=classes))


def test_guidance_of_one_leaves_the_condition_alone_and_others_extrapolate():
    denoiser, noise = NetworkDenoiser(flow_network()), normal(3, 4, dtype=torch.float32)
    told = {"label": torch.arange(3)}
    one = endpoints(denoiser, noise, told, PairSampling("euler", 1, 1.0))
    none = endpoints(denoiser, noise, denoiser.null(told), PairSampling("euler", 1, 1.0))
    guided = endpoints(denoiser, noise, told, PairSampling("euler", 1, 1.5))
    t = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(one, noise - denoiser(noise, t, told).velocity)
    # The paper's a v(c) + (1 - a) v(null), linear in one step's endpoint
    torch.testing.assert_close(guided, 1.5 * one - 0.5 * none)
    assert (guided - one).abs().max() > 1e-3


def test_endpoints_go_by_the_named_solver():
    ring, noise = GaussianMixtureDenoiser.ring(Cosine()), normal(8, 2, dtype=torch.float32)
    made = endpoints(ring, noise, how=PairSampling("dpmpp_2m", 10))
    assert torch.equal(made, generate(ring, noise, steps=10, solver="dpmpp_2m"))
    flow = NetworkDenoiser(flow_network())
    x = normal(3, 4, dtype=torch.float32)
    quirk = endpoints(flow, x, how=PairSampling(steps=4, eps=0.05, compat=True))
    assert torch.equal(quirk, rectified_euler(lambda x, t: flow(x, t), x, 4, 0.05, compat=True).detach())
    assert not torch.equal(quirk, endpoints(flow, x, how=PairSampling(steps=4)))
    assert not quirk.requires_grad


def test_the_bank_keeps_what_it_was_given_and_travels_in_checkpoints():
    bank = PairBank(6, torch.zeros(2, 3))
    index = torch.tensor([4, 1])
    assert bank.missing(torch.tensor([4, 1, 5])).tolist() == [0, 1, 2]
    rows = normal(2, 3, dtype=torch.float32)
    bank.store(index, rows)
    assert bank.missing(torch.tensor([4, 0, 1])).tolist() == [1]
    assert torch.equal(bank.recall(index.flip(0)), rows.flip(0))
    other = PairBank(6, torch.zeros(2, 3))
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other.recall(index), rows)
    assert other.missing(index).numel() == 0


def test_a_stacked_copy_takes_two_steps_in_one():
    network = flow_network().double()
    process = network.limbeck_process
    stacked = note_process(Stacked(network), process)
    x, told = normal(3, 4), {"label": torch.arange(3)}
    one = generate(NetworkDenoiser(stacked), x, told, steps=1, solver="euler")
    torch.testing.assert_close(one, generate(NetworkDenoiser(network), x, told, steps=2, solver="euler"))
    assert sum(p.numel() for p in stacked.parameters()) == 2 * sum(p.numel() for p in network.parameters())


def test_plain_wiring_feeds_the_output_on():
    network = flow_network()
    x, time = normal(3, 4, dtype=torch.float32), torch.rand(3)
    stacked = Stacked(network, flow_network(1), "plain")
    assert torch.equal(stacked(x, time, {}), stacked.second(network(x, time, {}), time, {}))


def test_both_halves_learn_and_the_shipped_one_loads_again(tmp_path):
    torch.manual_seed(0)
    model = StackedDenoiser(numbers=4, width=8, depth=1, wiring="plain")
    x, time = normal(2, 4, dtype=torch.float32), torch.rand(2)
    model(x, time, {}).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for half in (model.first, model.second) for p in half.exit.parameters())
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert isinstance(loaded, StackedDenoiser)
    assert torch.equal(loaded(x, time, {}), model(x, time, {}))
    assert model.layers() == ["first.stages.0", "second.stages.0"]


def test_a_stacked_network_of_diffusers_counts_times_to_a_thousand():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    process = Process(FlowMatching(), Direct("velocity", 1000.0))
    stacked = note_process(Stacked(note_process(network, process)), process)
    x = normal(2, 1, 8, 8, dtype=torch.float32)
    with torch.no_grad():
        one = generate(NetworkDenoiser(stacked), x, steps=1, solver="euler")
        two = generate(NetworkDenoiser(network), x, steps=2, solver="euler")
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_a_noted_decoder_is_found_and_neither_trained_nor_saved():
    class Vae(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.weight * x

    network, other = nn.Linear(2, 2), nn.Linear(2, 2)
    note_decoder(network, Vae())
    assert decoder_of(None, other, network)(torch.ones(1)).item() == 2
    assert decoder_of(None, other)(torch.ones(1)).item() == 1
    assert set(network.state_dict()) == {"weight", "bias"}
    assert len(list(network.parameters())) == 2
