import copy
import math
import warnings

import pytest
import torch
from torch import nn

from limbeck.core.errors import IncompatibleError
from limbeck.core.low_rank import LowRankNetwork
from limbeck.core.method import Clock
from limbeck.core.registry import method_class
from limbeck.diffusion.denoiser import NetworkDenoiser, Process, Transported, process_of
from limbeck.diffusion.generation import generate
from limbeck.diffusion.mixture import GaussianMixtureDenoiser
from limbeck.diffusion.noise_levels import draw_between
from limbeck.diffusion.parameterisations import Direct, Preconditioned
from limbeck.diffusion.rollouts import backward_simulation, student_times
from limbeck.diffusion.schedules import EDM, Cosine, VPDiscrete
from limbeck.diffusion.score_distillation import denoising_error, distribution_direction, inject_gradient
from limbeck.methods.distribution.collapse import CollapseMonitor, spread
from limbeck.methods.distribution.discriminators import Discriminator, head_for, middle_layer
from limbeck.models.denoising_mlp import DenoisingMLP
from limbeck.objectives.adversarial import logistic_discriminator, logistic_generator
from tests.contract.rigs import RIGS
from tests.methods.distribution.recorded import NULL, Recorded, data_prediction, direct, drawing
from tests.methods.trajectory.toys import Given, Linear, build, images, with_process
from tests.oracles.oracle import load

SD = VPDiscrete.named("scaled-linear")


@pytest.fixture(scope="module")
def oracle():
    (case,) = load("dmd2")
    return case.tensors


def close(actual, expected, rtol=1e-4, atol=1e-6):
    torch.testing.assert_close(actual.detach().reshape(expected.shape).to(expected), expected, rtol=rtol, atol=atol)


def of_edm(oracle, **options):
    """The method on networks that say what was recorded of EDM."""
    process, x = direct(EDM(), "x0"), oracle["edm_dm.x_gen"]
    teacher = with_process(Recorded(oracle["edm_dm.D_real"]), process)
    method = build("dmd2", with_process(Linear(1.0, 0.0), process), x, teacher=teacher, gan_weight=0.0, **options)
    method.critic = Recorded(oracle["edm_dm.D_fake"].clone().requires_grad_())
    return method


def of_sd(oracle, **options):
    """The same of Stable Diffusion, with and without its condition."""
    process, x = direct(SD, "eps", null_label=NULL), oracle["sd_dm.x_gen"]
    said = [oracle[f"sd_dm.eps_real_{part}"] for part in ("cond", "uncond")]
    teacher = with_process(Recorded(*said), process)
    student = with_process(Linear(1.0, 0.0), process)
    method = build("dmd2", student, x, teacher=teacher, classes=1, gan_weight=0.0, **options)
    method.critic = Recorded(oracle["sd_dm.eps_fake"].clone().requires_grad_())
    return method


def test_matching_in_edm_is_as_recorded(oracle):
    method, x = of_edm(oracle), oracle["edm_dm.x_gen"].clone().requires_grad_()
    given = {"matching time": drawing(oracle["edm_dm.t_index"], 20, 980), "matching noise": oracle["edm_dm.eps"]}
    draws = Given(4, **given)
    close(method.noised(x, draws)[0], oracle["edm_dm.x_t"])
    loss, logs = method.student_loss(x, x.detach(), {}, draws)
    loss.backward()
    close(loss, oracle["edm_dm.loss"])
    close(logs["matching"], oracle["edm_dm.loss"])
    close(x.grad, oracle["edm_dm.grad_x_gen"], atol=1e-9)
    real, fake = method.scores(x.detach(), torch.ones(4), {})
    close(distribution_direction(x.detach(), real, fake), oracle["edm_dm.normalised_direction"])


@pytest.mark.parametrize("scale", [1.75, 8.0])
def test_guided_matching_in_stable_diffusion_is_as_recorded(oracle, scale):
    method, x = of_sd(oracle, guidance=scale), oracle["sd_dm.x_gen"].clone().requires_grad_()
    given = {"matching time": drawing(oracle["sd_dm.t"], 20, 980), "matching noise": oracle["sd_dm.eps"]}
    draws, condition = Given(4, **given), {"label": torch.zeros(4, dtype=torch.long)}
    x_t, t, _ = method.noised(x.detach(), draws)
    assert t.tolist() == oracle["sd_dm.t"].tolist()
    real, fake = method.scores(x_t, t, condition)
    close(real.x0, oracle[f"sd_dm_cfg{scale}.pred_real_x0"])
    close(fake.x0, oracle[f"sd_dm_cfg{scale}.pred_fake_x0"])
    loss, _ = method.student_loss(x, x.detach(), condition, draws)
    loss.backward()
    close(loss, oracle[f"sd_dm_cfg{scale}.loss"])
    close(x.grad, oracle[f"sd_dm_cfg{scale}.grad_x_gen"], atol=1e-9)


def test_losses_of_the_fake_score_are_as_recorded(oracle):
    sigma = oracle["edm.karras_sigmas_ascending"][oracle["edm_dm.t_index"]].double()
    method = of_edm(oracle, critic_loss="edm")
    loss = method.critic_loss(oracle["edm_dm.x_gen"], (oracle["edm_dm.x_t"], sigma, oracle["edm_dm.eps"]), {})
    loss.backward()
    close(loss, oracle["edm_fake.loss"])
    close(method.critic.conditional.grad, oracle["edm_fake.grad_D_fake"])
    method, t = of_sd(oracle), oracle["sd_dm.t"].double()
    x, eps = oracle["sd_dm.x_gen"], oracle["sd_dm.eps"]
    close(method.critic_loss(x, (SD.add_noise(x, eps, t), t, eps), {}), oracle["sd_fake.loss"])


def test_the_game_is_as_recorded(oracle):
    real, fake = (oracle[f"gan.logits_{kind}"].clone().requires_grad_() for kind in ("real", "fake"))
    loss = logistic_discriminator(real, fake)
    loss.backward()
    close(loss, oracle["gan.disc_loss"])
    close(real.grad, oracle["gan.disc_grad_logits_real"])
    close(fake.grad, oracle["gan.disc_grad_logits_fake"])
    fake.grad = None
    loss = logistic_generator(fake)
    loss.backward()
    close(loss, oracle["gan.gen_loss"])
    close(fake.grad, oracle["gan.gen_grad_logits_fake"])


def test_levels_are_drawn_from_the_recorded_grid(oracle):
    drawn = draw_between(drawing(torch.arange(1000), 0, 999), EDM())
    close(drawn, oracle["edm.karras_sigmas_ascending"], rtol=1e-5, atol=0)
    ends = torch.tensor([0.0, 1 - 2**-24])
    assert draw_between(ends, SD).tolist() == [0, 999]
    assert draw_between(ends, SD, 0.02, 0.98).tolist() == [20, 980]
    close(draw_between(ends, EDM(0.05, 5.0), points=None, rho=1000.0), torch.tensor([0.05, 5.0]), rtol=1e-3)
    middle = draw_between(torch.tensor([0.5]), EDM(0.05, 5.0), points=None, rho=1000.0)
    assert abs(float(middle) - 0.5) < 0.01  # geometric: the root of 0.05 times 5
    close(draw_between(ends, Cosine(), 0.25, 0.75), torch.tensor([0.25, 0.75]), rtol=1e-3)


class Wavy(nn.Module):
    """0.9 z + 0.05 sin(3 z), the student of the recorded rollouts."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.9))

    def forward(self, x, time, condition):
        return self.scale * x + 0.05 * (3 * x).sin()


def test_steps_are_as_recorded(oracle):
    assert student_times(SD, 4)[:-1].tolist() == oracle["backsim.denoising_step_list"].tolist() == [999, 749, 499, 249]
    assert student_times(SD, 1, 399.0).tolist() == [399, -1]
    edm = student_times(EDM(), 2).tolist()
    assert edm[0] == pytest.approx(80)
    assert edm[1] == pytest.approx(((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7)
    assert edm[2] == 0


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_backward_simulation_is_as_recorded(oracle, stop):
    times, z0 = student_times(SD, 4), oracle["backsim.z0"]
    denoiser = NetworkDenoiser(Wavy(), direct(SD, "eps"))
    clean = backward_simulation(denoiser, z0, times, stop, lambda j: oracle[f"backsim.renoise{j}"], SD)
    assert not clean.requires_grad
    close(clean, oracle[f"backsim_n4_stop{stop}.clean_image"])
    assert times[stop] == oracle[f"backsim_n4_stop{stop}.next_timestep"][0]
    # ... and as the method's input to the one call that keeps a graph.
    method = build("dmd2", with_process(Wavy(), direct(SD, "eps")), z0, teacher=with_process(Wavy(), direct(SD, "eps")),
                   gan_weight=0.0, steps=4)  # fmt: skip
    torch.manual_seed(0)
    noise, seeds = torch.randn_like(z0), iter(range(1000))
    method.step_noise = {
        "noise": noise,
        "start": z0,
        **{f"renoise{j}": oracle[f"backsim.renoise{j}"] for j in range(3)},
    }
    asked = []
    method.student.register_forward_hook(lambda module, args, output: asked.append((args[0], args[1])))
    while len(asked) != stop + 1:  # until the shared number is `stop`
        asked.clear()
        method.clock = Clock(0, 100, 0.0, next(seeds))
        x = method.samples(z0, {}, Given(2, **method.step_noise))
    x_in, told = asked[-1]
    close(x_in, noise if stop == 0 else SD.add_noise(clean, noise, times[stop].expand(2)))
    assert told.tolist() == [float(times[stop])] * 2
    x.sum().backward()
    close(method.student.scale.grad, (-SD.sigma(times[stop]) / SD.alpha(times[stop]) * x_in.sum()).detach(), rtol=1e-3)


def test_later_steps_can_be_trained_on_noised_data():
    x0 = torch.randn(2, 1, 2, 2)
    method = build("dmd2", with_process(Wavy(), direct(SD, "eps")), x0, teacher=with_process(Wavy(), direct(SD, "eps")),
                   gan_weight=0.0, steps=2, inputs="data")  # fmt: skip
    seen = set()
    for seed in range(20):
        method.clock, asked, noise = Clock(0, 100, 0.0, seed), [], torch.randn_like(x0)
        handle = method.student.register_forward_hook(lambda module, args, output, asked=asked: asked.append(args))
        method.samples(x0, {}, Given(2, noise=noise))
        handle.remove()
        ((x_in, told, _),) = asked
        seen.add(float(told[0]))
        close(x_in, noise if told[0] == 999 else SD.add_noise(x0, noise, told.double()))
    assert seen == {999, 499}


def test_equal_scores_move_nothing():
    x = torch.randn(3, 4, requires_grad=True)
    same = data_prediction(torch.randn(3, 4), EDM())
    loss = inject_gradient(x, distribution_direction(x.detach(), same, same))
    loss.backward()
    assert loss == 0
    assert x.grad.abs().max() == 0


def test_the_direction_does_not_know_the_scale_of_errors():
    x, real, fake = torch.randn(3, 3, 5)
    first = distribution_direction(x, data_prediction(real, EDM()), data_prediction(fake, EDM()))
    real, fake = x + 7 * (real - x), x + 7 * (fake - x)
    again = distribution_direction(x, data_prediction(real, EDM()), data_prediction(fake, EDM()))
    torch.testing.assert_close(again, first)
    size = (x - real).abs().mean(1, keepdim=True)
    torch.testing.assert_close(first, (fake - real) / size)
    leaf = x.clone().requires_grad_()
    inject_gradient(leaf, first).backward()
    torch.testing.assert_close(leaf.grad, first / first.numel())


def test_the_difference_of_scores_in_noise():
    x_t, real, fake = torch.randn(3, 6, 5)
    t = torch.randint(20, 980, (6,)).double()
    net = [NetworkDenoiser(Recorded(eps), direct(SD, "eps"))(x_t, t) for eps in (real, fake)]
    ratio = (SD.sigma(t) / SD.alpha(t)).float()[:, None]
    torch.testing.assert_close(net[1].x0 - net[0].x0, ratio * (real - fake), rtol=1e-3, atol=1e-4)


def test_errors_of_the_fake_score():
    x0, noise, said = torch.randn(3, 4, 5)
    sigma = torch.tensor([0.1, 0.5, 2.0, 30.0]).double()
    prediction = NetworkDenoiser(Recorded(said), direct(EDM(), "x0"))(x0 + sigma[:, None].float() * noise, sigma)
    plain = denoising_error(prediction, x0, noise, "x0")
    torch.testing.assert_close(plain, (said - x0).square().mean(1))
    torch.testing.assert_close(denoising_error(prediction, x0, noise, "prediction"), plain)
    weight = (sigma.square() + 0.25) / (sigma * 0.5).square()  # another form of sigma^-2 + sigma_data^-2
    torch.testing.assert_close(denoising_error(prediction, x0, noise, "edm"), weight.float() * plain)
    in_noise = denoising_error(prediction, x0, noise, "eps")
    torch.testing.assert_close(in_noise, plain / sigma.square().float(), rtol=1e-3, atol=1e-4)


def steps_of(kind, options, count=4):
    """Names of what moved in each step of the contract suite's rig."""
    rig = RIGS["generation"]
    card = kind.card
    torch.manual_seed(0)
    method = rig.method(kind)
    method = kind(
        kind.Options(**{**card.tiny, **options}), student=method.student, teacher=method.teacher, data=method.data
    )
    trainer, moved = rig.trainer(method, steps=count), []
    method.train()
    for micro_batches in trainer.loader.steps(0, count):
        before = copy.deepcopy(method.state_dict())
        trainer.train_step(micro_batches)
        trainer.step += 1
        after = method.state_dict()
        moved.append({name.partition(".")[0] for name in after if not torch.equal(before[name], after[name])})
    return moved


@pytest.mark.parametrize("always", [True, False])
def test_whose_turn_it_is(always):
    moved = steps_of(method_class("dmd2"), {"critic_updates": 3, "critic_always": always})
    assert ["student" in names for names in moved] == [True, False, False, True]
    wanted = [always, True, True, always]
    assert ["critic" in names for names in moved] == wanted
    assert ["discriminator" in names for names in moved] == wanted


@pytest.mark.parametrize(
    "options",
    [
        {"features": "teacher", "gan_shares_noise": True, "critic_always": False, "floor": 1e-6, "r1_weight": 100.0},
        {"features": "own", "r1_weight": 1.0, "r1": "exact", "real_shares_noise": True},
        {"critic": "low-rank", "critic_rank": 2, "feature_layers": ["stages.*"]},
        {"critic_source": "student", "gan_weight": 0.0},
    ],
)
def test_variants_move_their_players(options):
    moved = set().union(*steps_of(method_class("dmd2"), options, 3))
    assert {"student", "critic"} <= moved
    assert ("discriminator" in moved) == (options.get("gan_weight") != 0.0)
    assert ("judge" in moved) == (options.get("features") == "own")


def test_a_warm_up_regresses_on_the_teachers_samples():
    kind = method_class("dmd2")
    moved = steps_of(kind, {"warm_up": 2, "critic_updates": 2})
    assert moved[:2] == [{"student"}, {"student"}]
    assert {"student", "critic"} <= moved[2]
    mixture = GaussianMixtureDenoiser.ring(EDM())
    student = with_process(Linear(0.0, 0.0), direct(EDM(), "x0"))
    method = build("dmd2", student, torch.zeros(4, 2), teacher=mixture, gan_weight=0.0, warm_up=1)
    noise = torch.randn(4, 2)
    loss = method.warm_up_loss(torch.zeros(4, 2), {}, Given(4, noise=noise))
    with torch.no_grad():
        wanted = generate(mixture, noise).square().mean()  # the student says 0
    torch.testing.assert_close(loss, wanted)
    assert [update.player for update in method.step(images(torch.zeros(4, 2)))] == ["student"]


def teacher_of(width=8, depth=3, **options):
    return with_process(DenoisingMLP(2, 0, width, depth), Process(EDM(), Preconditioned(0.5), **options))


def test_a_low_rank_fake_score_shares_the_teachers_weights():
    teacher, x0 = teacher_of(), torch.randn(4, 2)
    before = copy.deepcopy(teacher.state_dict())
    method = build("dmd2", DenoisingMLP(2, 0, 4, 1), x0, teacher=teacher, critic="low-rank", critic_rank=2)
    assert isinstance(method.critic, LowRankNetwork)
    theirs = {id(p) for p in teacher.parameters()}
    assert {id(p) for p in method.critic.network.parameters()} <= theirs
    assert not theirs & {id(p) for p in method.parameters()}
    sigma = torch.full((4,), 0.7)
    torch.testing.assert_close(method.fake(x0, sigma).x0, method.teacher_denoiser(x0, sigma).x0, rtol=0, atol=0)
    loss = method.critic_loss(x0, method.noised_for_critic(x0, method.draws(images(x0))), {})
    loss.backward()
    assert all(addition.up.weight.grad.abs().sum() > 0 for addition in method.critic.additions)
    with torch.no_grad():
        for parameter in method.critic.parameters():
            parameter.add_(0.1)
    assert not torch.allclose(method.fake(x0, sigma).x0, method.teacher_denoiser(x0, sigma).x0)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    copied = copy.deepcopy(method)
    with torch.no_grad():
        for parameter in method.critic.parameters():
            parameter.zero_()
    torch.testing.assert_close(method.fake(x0, sigma).x0, method.teacher_denoiser(x0, sigma).x0, rtol=0, atol=0)
    assert not torch.allclose(copied.fake(x0, sigma).x0, method.fake(x0, sigma).x0)


def test_low_rank_additions_to_convolutions_are_those_of_a_changed_weight():
    conv = nn.Sequential(nn.Conv2d(3, 5, 3, 2, 1)).requires_grad_(False)
    network, x = LowRankNetwork(conv, 2, 4.0), torch.randn(2, 3, 8, 8)
    (addition,) = network.additions
    nn.init.normal_(addition.up.weight)
    change = torch.einsum("or,rihw->oihw", addition.up.weight[:, :, 0, 0], addition.down.weight)
    wanted = torch.conv2d(x, conv[0].weight + 4.0 / 2 * change, conv[0].bias, 2, 1)
    torch.testing.assert_close(network(x), wanted, rtol=1e-4, atol=1e-5)


def test_a_student_in_another_schedule_gives_a_fake_score_in_the_teachers():
    x0 = torch.randn(4, 2)
    student = with_process(DenoisingMLP(2, 0, 8, 2), Process(Cosine(), Direct("v")))
    method = build("dmd2", student, x0, teacher=teacher_of(), critic_source="student")
    assert isinstance(method.fake, Transported)
    assert method.fake.schedule is method.schedule
    assert isinstance(method.denoiser.schedule, Cosine)
    updates = list(method.step(images(x0)))
    assert [update.player for update in updates] == ["student", "critic"]


def test_the_discriminators_pass_is_truncated_and_its_gradients_stop_at_frozen_weights():
    x0, teacher = torch.randn(4, 2), teacher_of()
    method = build("dmd2", DenoisingMLP(2, 0, 4, 1), x0, teacher=teacher)
    passed = []
    for network in (method.critic, teacher):
        for name in ("stages.1", "stages.2", "exit"):
            network.get_submodule(name).register_forward_hook(lambda module, args, out, name=name: passed.append(name))
    draws, x = method.draws(images(x0)), torch.randn(4, 2, requires_grad=True)
    logits = method.generator_logits(x, method.noised(x, draws), {}, draws)
    assert passed == ["stages.1"]
    logits.sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(
        parameter.grad is None for parameter in (*method.critic.parameters(), *method.discriminator.parameters())
    )
    assert all(parameter.requires_grad for parameter in method.critic.parameters())
    loss, _ = method.discriminator_loss(x0, method.noised_for_game(x.detach(), draws, "fake game"), {}, draws)
    loss.backward()
    assert method.critic.entry.weight.grad.abs().sum() > 0  # its own weights are trained by the game too
    assert method.critic.exit.weight.grad is None


def test_losses_add_up():
    x0 = torch.randn(4, 2)
    options = {"gan_weight": 0.3, "discriminator_weight": 0.2, "r1_weight": 10.0, "matching_weight": 2.0}
    method = build("dmd2", DenoisingMLP(2, 0, 4, 1), x0, teacher=teacher_of(), **options)
    draws = method.draws(images(x0))
    for_student, for_critic = method.step(images(x0))
    logs = for_student.logs
    torch.testing.assert_close(for_student.loss, 2.0 * logs["matching"] + 0.3 * logs["game"])
    shown = [method.noised_for_game(x, draws, f"{kind} game") for kind, x in
             (("fake", method.samples(x0, {}, draws)), ("real", x0))]  # fmt: skip
    (x_t, t, _), (y_t, t_real, noise) = shown
    moved = method.schedule.add_noise(x0 + 0.1 * draws.normal("r1", x0), noise, t_real)
    seen = [(x_t, t), (y_t, t_real), (moved, t_real)]
    fake, real, perturbed = (method.discriminator(method.fake, *at, {}) for at in seen)
    game = (1 + fake.exp()).log().mean() + (1 + (-real).exp()).log().mean()
    wanted = for_critic.logs["denoising"] + 0.2 * (game + 10.0 * (real - perturbed).square().mean())
    torch.testing.assert_close(for_critic.loss, wanted)
    assert for_critic.logs["accuracy"] == ((real > 0).sum() + (fake <= 0).sum()) / 8
    # The exact penalty is the squared gradient at the noised data.
    exact = build("dmd2", DenoisingMLP(2, 0, 4, 1), x0, teacher=teacher_of(), r1="exact", r1_weight=10.0)
    loss, logs = exact.discriminator_loss(x0, shown[0], {}, draws)
    leaf = y_t.detach().requires_grad_()
    (slope,) = torch.autograd.grad(exact.discriminator(exact.fake, leaf, t_real, {}).sum(), leaf)
    torch.testing.assert_close(loss, logs["game"] + 10.0 * slope.square().sum() / 4)


def test_heads_and_middles():
    head = head_for(torch.zeros(2, 64, 16, 16))
    strides = [layer.stride[0] for layer in head if isinstance(layer, nn.Conv2d)]
    assert strides == [2, 2, 4, 1]
    assert head(torch.randn(2, 64, 16, 16)).shape == (2, 1)
    for shape in ((2, 6, 2, 2), (2, 10), (2, 7, 10)):
        assert head_for(torch.zeros(shape))(torch.randn(shape)).shape == (2, 1)
    assert middle_layer(DenoisingMLP(depth=3)) == "stages.1"
    with pytest.raises(IncompatibleError, match="feature_layers"):
        middle_layer(Linear(1.0, 0.0))
    with pytest.raises(IncompatibleError, match="no network"):
        Discriminator(GaussianMixtureDenoiser.ring(EDM()), torch.zeros(2, 2), torch.ones(2), {})


def test_how_the_result_is_sampled():
    x0 = torch.randn(4, 2)
    student = DenoisingMLP(2, 0, 4, 1)
    method = build("dmd2", student, x0, teacher=teacher_of(), input_time=2.5)
    process, noise = process_of(student), torch.randn(4, 2)
    assert (process.sampling.solver, process.sampling.times) == ("consistency", (2.5, 0.0))
    expected = method.denoiser(2.5 * noise, torch.full((4,), 2.5).double()).x0
    torch.testing.assert_close(generate(method.denoiser, noise), expected)
    torch.testing.assert_close(method.samples(x0, {}, Given(4, noise=noise)), expected)
    assert method.schedule.t_max == 80
    with pytest.raises(IncompatibleError, match="input_time"):
        build("dmd2", DenoisingMLP(2, 0, 4, 1), x0, teacher=teacher_of(), input_time=100.0)


def test_collapse_is_told_of_once():
    data = torch.cat([torch.randn(40, 2) + 10 * torch.eye(2)[k % 2] * (1 - k // 2 * 2) for k in range(4)])
    healthy = spread(data[torch.randperm(160)] + 0.1 * torch.randn(160, 2), data)
    one_mode = spread(0.1 * torch.randn(160, 2) + 30, data)
    assert healthy["coverage"] > 0.5
    assert abs(healthy["variance"] - 1) < 0.1
    assert one_mode["coverage"] < 0.05
    assert one_mode["variance"] < 0.01
    assert all(math.isfinite(value) for value in spread(data[:1], data[:1]).values())
    monitor = CollapseMonitor()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(500):
            monitor.watch({**healthy, "accuracy": torch.tensor(0.7)}, step)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1000):
            monitor.watch({**one_mode, "accuracy": torch.tensor(1.0)}, step)
    told = " ".join(str(warning.message) for warning in caught)
    assert len(caught) == 3  # each once
    assert all(words in told for words in ("vary less", "next to less", "nearly all samples"))


def test_a_unet_of_diffusers():
    pytest.importorskip("diffusers")
    from diffusers import UNet2DModel

    from limbeck.core.batch import Batch
    from limbeck.core.specs import TrainSpec
    from limbeck.core.trainer import Trainer
    from limbeck.data.loader import Loader
    from limbeck.data.source import ArraySource

    def unet():
        return UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
            layers_per_block=1, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
            attention_head_dim=4, num_class_embeds=5,
        )  # fmt: skip

    torch.manual_seed(0)
    teacher = with_process(unet(), Process(SD, Direct("eps"), null_label=4))
    source = ArraySource(torch.rand(8, 1, 8, 8), torch.arange(8) % 4, normalisation=([0.5], [0.5]))
    kind, rows = method_class("dmd2"), []
    options = kind.Options(critic_updates=2, steps=4, guidance=1.75, critic="low-rank", critic_rank=2)
    from limbeck.core.teacher import LiveTeacher

    student = unet()
    student.load_state_dict(teacher.state_dict())
    method = kind(options, student=student, teacher=LiveTeacher(teacher), data=source.info())
    assert middle_layer(student) == "mid_block"
    spec = TrainSpec(steps=3, batch_size=4, log_every=1)
    result = Trainer(method, Loader(source, 4, 0), spec, steps=3, items=8, seed=0, record=rows.append).fit()
    assert all(math.isfinite(row["critic/loss"]) for row in rows)
    assert isinstance(source.fetch(torch.arange(2)), Batch)
    with torch.no_grad():
        image = generate(NetworkDenoiser(result.eval()), torch.randn(2, 1, 8, 8), {"label": torch.tensor([0, 3])})
    assert image.shape == (2, 1, 8, 8)
