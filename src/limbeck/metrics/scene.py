"""How a scene looks: seen all around, judged by the data and by the teacher."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.core.randomness import generator
from limbeck.diffusion.decoding import encoder_of
from limbeck.diffusion.denoiser import denoiser_of
from limbeck.diffusion.mixture import GaussianMixtureDenoiser
from limbeck.diffusion.noise_levels import draw_between
from limbeck.metrics.distances import pooled_pixels
from limbeck.models.modes import evaluating
from limbeck.models.normalisation import normalisation_of
from limbeck.rendering.images import ImageScene
from limbeck.rendering.particles import all_around, as_pictures, particle_count, particles_of, shown_from
from limbeck.rendering.scene import Scene

if TYPE_CHECKING:
    from limbeck.data.source import Source

VIEWS = 12
"""Cameras of the turntable at which scenes are measured."""
_NOISED = 8  # times at which the teacher is asked about each picture
_MOST = 2000  # items of the source that the judge knows


def evaluate_scene(
    model: nn.Module,
    source: "Source",
    *,
    teacher: Any = None,
    batch_size: int = 256,
    pause: Callable[[], Any] | None = None,
) -> dict[str, int | float]:
    """Renders every particle once around, or shows each image once, and says what is seen.

    Args:
        model: a scene.
        source: whose labelled images a judge is fitted to, and whose size the renderings have.
        teacher: a live teacher; of an ensemble its first.
        batch_size: pictures that the teacher is asked about at a time.
        pause: called now and then; raises `Interrupted` when the run was asked to stop.

    Returns:
        `particles`; `views`; `opacity`, the mean share of the background that is hidden; where the source has classes
        and the pictures are like its own `judged_class`, which a logistic regression sees in most of the pictures, and
        `judged`, in what share of them; `difference`, the mean deviation between particles at the same pixel, for
        several; with a teacher `teacher_error`, the mean squared error of its guess, without a condition, of noise in
        the pictures, less where it expects such; of an analytic mixture also `modes`, the share of its components next
        to which there is a picture within three deviations, and `spread`, those pictures' deviation in units of theirs.

    Raises:
        IncompatibleError: the model is no scene.
    """
    if not isinstance(model, Scene):
        raise IncompatibleError(f"a {type(model).__name__} is no scene")
    example = source.info().example["image"]
    with evaluating(model):
        pictures = _pictures(model, example, teacher)
        figures: dict[str, int | float] = {
            "particles": particle_count(model),
            "views": len(pictures),
            "opacity": _opacity(model, example),
            **_judged(pictures, source),
            **_difference(pictures, particle_count(model)),
        }
        if pause is not None:
            pause()
        asked = getattr(teacher, "teachers", [teacher])[0]
        if asked is not None:
            figures |= _of_teacher(pictures, asked.model, batch_size)
    return figures


def _pictures(scene: Scene, example: Tensor, teacher: Any) -> Tensor:
    """The scene's pictures (views, ...) as the data are normalised; latents or points as they are."""
    height, width = (*example.shape[-2:],) if example.ndim == 4 else (1, 1)
    image = all_around(scene, VIEWS, height, width)
    if isinstance(scene, ImageScene) and not scene.bounded:
        return image
    encode = encoder_of(getattr(getattr(teacher, "teachers", [teacher])[0], "model", nn.Identity()))
    if encode is not None:
        return encode(2 * image - 1)
    channels = example.shape[1]
    return as_pictures(image, channels, *(normalisation_of(scene) or ([0.5] * channels, [0.5] * channels)))


def _opacity(scene: Scene, example: Tensor) -> float:
    if isinstance(scene, ImageScene):
        return 1.0
    weight = next(scene.parameters())
    cameras = shown_from(scene, VIEWS, *example.shape[-2:]).to(weight.device).to(weight.dtype)
    return float(torch.stack([part.render(cameras).opacity.mean() for part in particles_of(scene)]).mean())


def _judged(pictures: Tensor, source: "Source") -> dict[str, int | float]:
    """What a judge sees who knows the data alone."""
    rows = torch.arange(min(len(source), _MOST))
    known: Batch = source.fetch(rows)
    if source.classes < 2 or known["image"].shape[1:] != pictures.shape[1:] or pictures.ndim != 4:
        return {}
    from sklearn.linear_model import LogisticRegression

    labelled = known["label"] >= 0
    data, truth = pooled_pixels(known["image"])[labelled].double().numpy(), known["label"][labelled].numpy()
    judge = LogisticRegression(max_iter=1000).fit(data, truth)
    seen = torch.from_numpy(judge.predict(pooled_pixels(pictures).double().cpu().numpy()))
    count = seen.bincount(minlength=source.classes)
    return {"judged_class": int(count.argmax()), "judged": float(count.max() / len(seen))}


def _difference(pictures: Tensor, particles: int) -> dict[str, float]:
    if particles < 2:
        return {}
    return {"difference": float(pictures.unflatten(0, (particles, -1)).std(0).mean())}


def _of_teacher(pictures: Tensor, model: nn.Module, batch_size: int) -> dict[str, float]:
    denoiser, errors = denoiser_of(model), []
    draws = generator(0, "scene")
    shares = (torch.arange(_NOISED) + 0.5) / _NOISED
    for part in pictures.split(batch_size):
        # Labels of a network without a null label cannot be left out; own networks take none at all as well.
        for share in shares:
            t = draw_between(share.expand(len(part)), denoiser.schedule, 0.02, 0.98).to(part.device)
            noise = torch.randn(part.shape, generator=draws).to(part)
            guess = denoiser(denoiser.schedule.add_noise(part, noise, t), t, {}).eps
            errors.append((guess - noise).square().flatten(1).mean(1))
    figures = {"teacher_error": float(torch.cat(errors).mean())}
    return figures | (_of_mixture(pictures, model) if isinstance(model, GaussianMixtureDenoiser) else {})


def _of_mixture(pictures: Tensor, mixture: GaussianMixtureDenoiser) -> dict[str, float]:
    points, near = pictures.flatten(1), mixture.label_of(pictures)
    offset = (points - mixture.means.to(points)[near]) / mixture.std.to(points)[near, None]
    within = offset.square().mean(1).sqrt() < 3
    reached = near[within].unique().numel() / len(mixture.means)
    spread = float(offset[within].square().mean().sqrt()) if within.any() else 0.0
    return {"modes": reached, "spread": spread}
