"""Variational score distillation against its authors' numbers, and where theory says what it does."""

import copy

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.errors import IncompatibleError
from limbeck.core.method import Clock
from limbeck.diffusion.denoiser import NetworkDenoiser, Process, note_process, process_of
from limbeck.diffusion.guidance import guided
from limbeck.diffusion.parameterisations import Direct
from limbeck.diffusion.predictions import Prediction, from_data_and_noise
from limbeck.diffusion.schedules import VPDiscrete, along
from limbeck.diffusion.score_distillation import denoising_error, entropic, inject_gradient, noise_residual, time_weight
from limbeck.methods.scenes.camera_score import CameraScore
from limbeck.models.scenes import GaussianScenes, VoxelScenes
from limbeck.rendering.cameras import turntable
from tests.methods.scenes.toys import SCHEDULE, batch_of, build, denoiser, gaussian, points
from tests.oracles.oracle import load

(CASE,) = load("prolific-dreamer")
RECORDED = CASE.tensors
TABLE = VPDiscrete(RECORDED["alphas_cumprod"].double())
IMAGES = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(3))


class Says(nn.Module):
    """The recorded outputs of the teacher: those without a text for the label 1."""

    def __init__(self, text: Tensor, uncond: Tensor) -> None:
        super().__init__()
        self.text, self.uncond = text, uncond

    def forward(self, x: Tensor, time: Tensor, condition: dict[str, Tensor]) -> Tensor:
        times = len(x) // len(self.text)
        text, uncond = self.text.repeat(times, 1, 1, 1), self.uncond.repeat(times, 1, 1, 1)
        return torch.where(condition["label"].view(-1, 1, 1, 1) == 1, uncond, text)


@pytest.mark.parametrize("name", ["vsd_eps", "vsd_v", "esd_half_v", "esd_zero_eps"])
def test_the_push_is_the_recorded_one(name):
    at = {key: RECORDED[f"{name}.{key}"] for key in ("latents", "t", "noise", "x_t", "q_camera_raw", "q_nocamera_raw")}
    made = CASE.hyperparameters[name]
    t = at["t"].double()
    x_t = TABLE.add_noise(at["latents"], at["noise"], t)
    torch.testing.assert_close(x_t, at["x_t"], rtol=1e-5, atol=1e-5)
    teacher = note_process(
        Says(RECORDED[f"{name}.teacher_text"], RECORDED[f"{name}.teacher_uncond"]),
        Process(TABLE, Direct("eps"), null_label=1),
    )
    label = {"label": torch.zeros(2, dtype=torch.int64)}
    asked = guided(NetworkDenoiser(teacher), x_t, t, label, made["guidance_scale"])
    kind = "v" if made["q_prediction"] == "v_prediction" else "eps"
    camera, free = (Prediction(at[f"q_{n}camera_raw"], kind, x_t, t, TABLE) for n in ("", "no"))
    other = entropic(camera, free, 1 - made["guidance_scale_lora"])
    push = along(time_weight("sigma2", t, TABLE), x_t) * noise_residual(asked, other)
    torch.testing.assert_close(push, RECORDED[f"{name}.grad"], rtol=1e-4, atol=2e-5)


def test_both_losses_and_the_gradient_are_the_recorded_ones():
    latents = RECORDED["fwd.latents_BHWC"].permute(0, 3, 1, 2).clone().requires_grad_()
    slope = RECORDED["fwd.dlossvsd_dlatents_BHWC"].permute(0, 3, 1, 2)
    loss = inject_gradient(latents, 2 * slope, "sum_over_items")  # the undivided field of two items
    torch.testing.assert_close(loss, RECORDED["fwd.loss_vsd"], rtol=1e-4, atol=0)
    (actual,) = torch.autograd.grad(loss, latents)
    torch.testing.assert_close(actual, slope, rtol=1e-4, atol=1e-5 * float(slope.abs().max()))
    torch.testing.assert_close(2 * actual.norm(), RECORDED["fwd.grad_norm"], rtol=1e-4, atol=0)
    t, noise = RECORDED["fwd.lora_t"], RECORDED["fwd.lora_noise"]
    x_t = TABLE.add_noise(latents.detach(), noise, t)
    said = Prediction(RECORDED["fwd.lora_output_raw"], "v", x_t, t, TABLE)
    error = denoising_error(said, latents.detach(), noise, "prediction").mean()
    torch.testing.assert_close(error, RECORDED["fwd.loss_lora"], rtol=1e-5, atol=0)


class Perfect(nn.Module):
    """phi that says a given noise."""

    def __init__(self, eps: Tensor) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x_t, t, condition, poses, schedule):
        return Prediction(self.eps, "eps", x_t, t, schedule)


def at_noise(method, seen):
    """A time, noise and noised pictures."""
    t = torch.full((len(seen.x0),), 400.0, dtype=torch.float64)
    noise = seen.draws.normal("noise", seen.x0)
    return method.schedule.add_noise(seen.x0.detach(), noise, t), t, noise


def test_with_the_true_noise_for_phi_it_is_score_distillation_to_the_bit():
    scene, labels = points(torch.randn(8, 16)), torch.arange(8) % 4
    images, teacher = torch.randn(8, 16, 1, 1), denoiser(16, classes=4)
    batch = batch_of(images, labels)
    vsd = build("prolific-dreamer", scene, images, teacher, classes=4, guidance=7.5)
    sds = build("sds", scene, images, teacher, classes=4, guidance=7.5)
    seen = vsd.look(batch)
    x_t, t, noise = at_noise(vsd, seen)
    vsd.critic = Perfect(noise)
    assert torch.equal(vsd.residual(seen, x_t, t, noise), sds.residual(sds.look(batch), x_t, t, noise))
    assert sds.residual(seen, x_t, t, noise).abs().max() > 0.1


def test_nothing_moves_where_phi_says_what_the_guided_teacher_says():
    images, teacher = torch.randn(8, 16, 1, 1), denoiser(16, classes=4)
    method = build("prolific-dreamer", points(torch.randn(8, 16)), images, teacher, classes=4)
    seen = method.look(batch_of(images))
    x_t, t, noise = at_noise(method, seen)
    method.critic = Perfect(method.ask(x_t, t, seen.condition, 7.5).eps)
    assert method.residual(seen, x_t, t, noise).abs().max() == 0


@pytest.mark.parametrize(("mean", "std", "moves"), [(0.5, 0.6, False), (0.0, 0.6, True), (0.5, 0.3, True)])
def test_between_gaussians_the_mean_push_vanishes_where_the_moments_are_equal(mean, std, moves):
    """Its mean over q, and its mean product with x0, which is what the variance feels."""
    torch.manual_seed(0)
    target, other = gaussian(0.5, 0.6), gaussian(mean, std)
    x0, t = other.draw(20000), torch.full((20000,), 300.0, dtype=torch.float64)
    x_t = SCHEDULE.add_noise(x0, torch.randn_like(x0), t)
    push = noise_residual(target(x_t, t), other(x_t, t))
    largest = torch.stack([push.mean().abs(), (push * (x0 - mean)).mean().abs()]).max()
    assert (largest > 0.01) if moves else (largest < 1e-6)


@pytest.mark.parametrize("critic", ["copy", "low-rank"])
def test_phi_begins_as_the_frozen_network_whatever_the_camera(critic):
    source = denoiser(16, classes=4).requires_grad_(False)
    phi = CameraScore(source, process_of(source), 4 if critic == "low-rank" else None)
    x_t, t = torch.randn(5, 1, 4, 4), torch.arange(5) * 100.0
    condition, poses = {"label": torch.arange(5) % 4}, turntable(5, 4, 4).world_from_camera.flatten(1)
    expected = NetworkDenoiser(source)(x_t, t, condition)
    for camera in (poses, torch.zeros_like(poses), None):
        assert torch.equal(phi(x_t, t, condition, camera, SCHEDULE).eps, expected.eps)
    again = copy.deepcopy(phi)
    with torch.no_grad():
        again.camera[-1].weight.normal_()
    assert not torch.allclose(again(x_t, t, condition, poses, SCHEDULE).eps, expected.eps)
    assert torch.equal(phi(x_t, t, condition, poses, SCHEDULE).eps, expected.eps), "the copy's camera is its own"
    names = [name for name, value in phi.named_parameters() if value.requires_grad]
    assert all(name.startswith(("base.additions", "camera")) for name in names) or critic == "copy"


def scenes(**more):
    torch.manual_seed(1)
    return VoxelScenes(resolution=4, samples=6, **more)


def test_each_loss_has_a_gradient_in_its_own_player_alone():
    method = build("prolific-dreamer", scenes(particles=2), IMAGES, denoiser(16, classes=4), classes=4, critic="copy")
    for update in method.step(batch_of(IMAGES)):
        method.zero_grad()
        update.loss.backward()
        with_gradient = {
            name
            for name, player in method.players().items()
            if any(p.grad is not None and p.grad.abs().max() > 0 for p in player.parameters())
        }
        assert with_gradient == {update.player}


def test_the_gradient_in_the_scene_is_the_push_over_the_number_of_views():
    images, labels = torch.randn(6, 3, 1, 1), torch.arange(6) % 4
    scene, teacher = points(torch.randn(6, 3)), denoiser(3, classes=4)
    method = build("prolific-dreamer", scene, images, teacher, denoiser(3, 4, "v", seed=1), classes=4, choice="in turn")
    seen = method.look(batch_of(images, labels))
    loss, _ = method.student_loss(seen)
    (actual,) = torch.autograd.grad(loss, scene.values)
    share = seen.draws.uniform("time").double()
    t = (20 + (share * 961).floor()).clamp(max=980)  # whole numbers from 0.02 T to 0.98 T
    x_t = SCHEDULE.add_noise(seen.x0.detach(), seen.draws.normal("noise", seen.x0), t)
    asked, null = {"label": labels}, {"label": torch.full_like(labels, 4)}
    with torch.no_grad():
        said, free = (NetworkDenoiser(teacher)(x_t, t, one).eps for one in (asked, null))
        phi = method.critic(x_t, t, asked, None, SCHEDULE)
    assert phi.kind == "v"
    alpha, sigma = (along(c(t), x_t) for c in (SCHEDULE.alpha, SCHEDULE.sigma))
    eps_phi = sigma * x_t + alpha * phi.value
    expected = sigma.square() * (free + 7.5 * (said - free) - eps_phi) / 6
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_phi_is_trained_in_what_it_predicts_over_all_times_and_without_the_camera_now_and_then():
    method = build(
        "prolific-dreamer", scenes(), IMAGES, denoiser(16, 4), denoiser(16, 4, "v"), classes=4, critic="copy"
    )
    given = []

    def recording(x_t: Tensor, t: Tensor, condition, poses, schedule):
        given.append((t, poses))
        return Prediction(torch.zeros_like(x_t), "v", x_t, t, schedule)

    seen = method.look(batch_of(IMAGES))
    method.critic.forward = recording
    loss = method.critic_loss(seen, "0")
    ((t, _),) = given
    noise = seen.draws.normal("critic noise 0", seen.x0)
    target = from_data_and_noise(seen.x0, noise, "v", t, SCHEDULE)
    torch.testing.assert_close(loss, target.square().mean())
    for number in range(200):
        method.critic_loss(seen, str(number))
    times = torch.cat([t for t, _ in given])
    assert times.min() < 20
    assert times.max() > 980
    told = torch.cat([poses.abs().sum(1) > 0 for _, poses in given]).float().mean()
    assert 0.85 < told < 0.95


def test_after_the_first_phase_the_teacher_is_asked_at_fewer_noisy_times():
    asked = {}
    for step in (0, 10):
        method = build("sds", points(torch.randn(400, 2)), torch.randn(400, 2), gaussian(0.0, 1.0), late_from=5,
                       late_time_high=0.5, step=step)  # fmt: skip
        residual = method.residual
        method.residual = lambda seen, x_t, t, noise, kept=residual, step=step: (
            asked.__setitem__(step, t) or kept(seen, x_t, t, noise)
        )
        method.student_loss(method.look(batch_of(torch.randn(400, 2))))
    assert (asked[0].min() >= 20) & (asked[10].min() >= 20)
    assert 900 < asked[0].max() <= 980
    assert 450 < asked[10].max() <= 500


def test_the_entropy_weight_mixes_what_phi_says_with_and_without_the_camera():
    def residual(weight: float) -> Tensor:
        method = build("prolific-dreamer", scenes(), IMAGES, denoiser(16, 4), classes=4, entropy_weight=weight)
        with torch.no_grad():
            torch.manual_seed(2)
            method.critic.camera[-1].weight.normal_()
            method.critic.camera[0].weight.normal_()
        method.eval()
        seen = method.look(batch_of(IMAGES))
        return method.residual(seen, *at_noise(method, seen))

    none, half, full = residual(0.0), residual(0.5), residual(1.0)
    assert (none - full).abs().max() > 1e-3
    torch.testing.assert_close(half, (none + full) / 2, rtol=1e-4, atol=1e-5)


def test_views_decide_which_label_the_teacher_is_asked_for_and_phi_is_not_told():
    options = {"labels": [1, 2, 3], "elevation": [-10.0, 10.0]}
    method = build("prolific-dreamer", scenes(), IMAGES, denoiser(16, 4), classes=4, **options)
    seen = method.look(batch_of(IMAGES))
    azimuth = seen.cameras.azimuth.abs()
    expected = torch.where(azimuth <= 45, 1, torch.where(azimuth >= 135, 3, 2))
    assert torch.equal(seen.condition["label"], expected)
    assert len(expected.unique()) > 1
    assert seen.plain["label"].eq(4).all()


def test_prompts_of_views_are_mixed_by_azimuth():
    from limbeck.methods.scenes.views import NAMES, prompt_of_view, view_shares

    rows = {f"prompt_{name}": torch.full((4, 2, 3), float(n)) for n, name in enumerate(NAMES)}
    batch = batch_of(IMAGES[:4], prompt=torch.full((4, 2, 3), 9.0), **rows)
    cameras = turntable(4, 4, 4)  # azimuths 0, 90, 180, -90
    mixed = prompt_of_view(batch, {"prompt": batch["prompt"]}, view_shares(cameras, "blended"))
    torch.testing.assert_close(mixed["prompt"][:, 0, 0], torch.tensor([0.0, 1.0, 2.0, 1.0]), rtol=0, atol=1e-5)


def test_what_cannot_work_is_refused():
    teacher = denoiser(16, 4)
    for problem, scene, options in (
        ("no scene", denoiser(16), {}),
        ("entropy along rays", GaussianScenes(count=4), {"ray_entropy": 1.0}),
        ("only meshes", scenes(), {"laplacian": 1.0}),
        ("no parameter", scenes(), {"frozen": ["vertices"]}),
        ("two classes", scenes(), {"labels": [1, 2]}),
        ("high", scenes(), {"elevation": [5.0, 1.0]}),
        ("time_low", scenes(), {"time_low": 0.6}),
    ):
        with pytest.raises(IncompatibleError, match=problem):
            build("prolific-dreamer", scene, IMAGES, teacher, classes=4, **options)
    with pytest.raises(IncompatibleError, match="second"):
        build("prolific-dreamer", points(torch.randn(4, 2)), torch.randn(4, 2), gaussian(0.0, 1.0))


class Fitted(nn.Module):
    """phi as the exact score of a Gaussian with the moments of the particles."""

    def __init__(self, scene: nn.Module) -> None:
        super().__init__()
        self.place = (scene,)

    def forward(self, x_t, t, condition, poses, schedule):
        points = self.place[0].values.detach().flatten(1)
        variance = along(SCHEDULE.alpha(t).square() * points.var() + SCHEDULE.sigma(t).square(), x_t)
        score = (x_t - along(SCHEDULE.alpha(t), x_t) * points.mean(0).view(1, -1, 1, 1)) / variance
        return Prediction(along(SCHEDULE.sigma(t), x_t) * score, "eps", x_t, t, schedule)


@pytest.mark.parametrize(("slug", "low", "high"), [("prolific-dreamer", 0.85, 1.15), ("sds", 0.0, 0.05)])
def test_particles_keep_the_spread_of_a_gaussian_that_score_distillation_loses(slug, low, high):
    torch.manual_seed(0)
    scene, images = points(2 + torch.randn(256, 2)), torch.zeros(256, 2)
    teachers = [gaussian(0.5, 0.6)] + [denoiser(2)] * (slug == "prolific-dreamer")
    method = build(slug, scene, images, *teachers, choice="in turn", late_from=10**6, reduction="sum_over_items")
    if slug == "prolific-dreamer":
        method.critic = Fitted(scene)
    optimizer = torch.optim.Adam([scene.values], 0.08)
    for step in range(250):
        method.clock = Clock(step, 250, 0.0, step)
        optimizer.param_groups[0]["lr"] = 0.08 * (1 - step / 250)
        optimizer.zero_grad()
        method.student_loss(method.look(batch_of(images)))[0].backward()
        optimizer.step()
    values = scene.values.detach().flatten(1)
    assert low <= float(values.var(0).mean() / 0.36) <= high
    assert (values.mean(0) - 0.5).abs().max() < 0.1


@pytest.mark.parametrize("critic", ["copy", "low-rank"])
def test_a_text_unet_of_diffusers_is_told_the_camera_beside_its_time(critic):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    process = Process(SCHEDULE, Direct("v", 1.0))
    note_process(unet.requires_grad_(False), process)
    phi = CameraScore(unet, process, 4 if critic == "low-rank" else None)
    x_t, t, condition = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 900.0]), {"prompt": torch.randn(2, 3, 8)}
    poses = turntable(2, 8, 8).world_from_camera.flatten(1)
    expected = NetworkDenoiser(unet)(x_t, t, condition).v
    assert torch.equal(phi(x_t, t, condition, poses, SCHEDULE).v, expected)
    with torch.no_grad():
        phi.camera[-1].weight.normal_()
    assert (phi(x_t, t, condition, poses, SCHEDULE).v - expected).abs().max() > 1e-4
    if critic == "low-rank":
        assert len(phi.base.additions) == 4 * 2 * 4  # four projections of two attentions in each of four transformers
    assert torch.equal(NetworkDenoiser(unet)(x_t, t, condition).v, expected), "the teacher is told nothing"
