"""Score distillation sampling where everything is Gaussian, and so known."""

import torch

from limbeck.diffusion.mixture import GaussianMixtureDenoiser
from tests.methods.scenes.toys import SCHEDULE, batch_of, build, gaussian, points

T = torch.tensor(400.0, dtype=torch.float64)
ALPHA, SIGMA = float(SCHEDULE.alpha(T)), float(SCHEDULE.sigma(T))


def pushed(method, where: float, items: int = 50000) -> torch.Tensor:
    """w(t) times the residual at one place (items, 1) under fresh noise, at t = 400."""
    torch.manual_seed(0)
    x0, t = torch.full((items, 1, 1, 1), where), T.expand(items)
    noise = torch.randn_like(x0)
    seen = method.look(batch_of(x0[:, :, 0, 0]))
    residual = method.residual(seen, SCHEDULE.add_noise(x0, noise, t), t, noise)
    return SIGMA**2 * residual.flatten(1)


def test_of_one_gaussian_the_push_has_the_mean_and_variance_of_theory():
    items, mean, std = 50000, 0.4, 0.5
    method = build("sds", points(torch.zeros(items, 1)), torch.zeros(items, 1), gaussian(mean, std, dim=1))
    push, variance = pushed(method, 1.0), ALPHA**2 * std**2 + SIGMA**2
    expected = SIGMA**2 * SIGMA * ALPHA * (1.0 - mean) / variance
    assert abs(float(push.mean()) - expected) < 0.005
    assert abs(float(push.var()) / (SIGMA**2 * ALPHA**2 * std**2 / variance) ** 2 - 1) < 0.03
    assert abs(float(pushed(method, mean).mean())) < 0.005  # it rests at the mean alone: collapse


def condition_narrower_than_all(mu: float, std: float, all_std: float) -> GaussianMixtureDenoiser:
    """Class 0 is N(mu, std^2), which counts for next to nothing beside N(0, all_std^2)."""
    means, stds = torch.tensor([[mu], [0.0]]), torch.tensor([std, all_std])
    weights = torch.tensor([1e-9, 1 - 1e-9])
    return GaussianMixtureDenoiser(means, stds, SCHEDULE, weights, torch.tensor([0, 1]))


def test_guidance_and_classifier_score_rest_beyond_the_mean_as_in_theory():
    mu, items = 0.5, 50000
    teacher = condition_narrower_than_all(mu, 0.5, 1.0)
    a, b = ALPHA**2 * 0.25 + SIGMA**2, ALPHA**2 + SIGMA**2
    for slug, scale in (("sds", 1.0), ("sds", 7.5), ("csd", None)):
        rest = mu * b / (b - a) if scale is None else mu * scale * b / (a + scale * (b - a))
        options = {} if scale is None else {"guidance": scale}
        method = build(slug, points(torch.zeros(items, 1)), torch.zeros(items, 1), teacher, classes=1, **options)
        assert abs(float(pushed(method, rest).mean())) < 0.01 * max(1.0, scale or 1.0)
        assert float(pushed(method, rest + 0.5).mean()) > 0.02
        assert float(pushed(method, rest - 0.5).mean()) < -0.02


def test_the_rest_of_the_classifier_score_is_that_of_an_infinite_guidance():
    teacher = condition_narrower_than_all(0.5, 0.5, 1.0)
    place = {"scene": points(torch.zeros(64, 1)), "images": torch.zeros(64, 1)}
    csd = build("csd", place["scene"], place["images"], teacher, classes=1)
    huge = build("sds", place["scene"], place["images"], teacher, classes=1, guidance=1000.0)
    torch.testing.assert_close(pushed(huge, 0.3, 64) / 1000, pushed(csd, 0.3, 64), rtol=0, atol=2e-3)


def test_frozen_parts_stay_and_meshes_are_kept_even():
    from limbeck.models.scenes import MeshScenes
    from tests.methods.scenes.toys import denoiser

    images = torch.randn(4, 1, 6, 6)
    torch.manual_seed(0)
    scene = MeshScenes(subdivisions=1, noise=0.1)
    options = {"shows": "normals", "consistency": 10.0, "laplacian": 1.0, "guidance": 1.0}
    method = build("sds", scene, images, denoiser(36, 4), classes=4, **options)
    seen = method.look(batch_of(images))
    rough = method.tidiness(seen.output)
    (slope,) = torch.autograd.grad(rough, scene.scenes[0].vertices)
    assert slope.abs().max() > 0
    with torch.no_grad():
        scene.scenes[0].vertices -= 0.01 * slope / slope.norm()
    assert method.tidiness(seen.output) < rough
    loss, _ = method.student_loss(method.look(batch_of(images)))
    loss.backward()
    assert scene.scenes[0].vertices.grad.abs().max() > 0
    textured = build("sds", MeshScenes(subdivisions=1), images, denoiser(36, 4), classes=4, frozen=["vertices"])
    trained = {name.rpartition(".")[2] for name, value in textured.student.named_parameters() if value.requires_grad}
    assert trained == {"colour_logits"}
