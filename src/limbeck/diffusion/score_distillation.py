"""Score distillation: pushing samples along the difference of two scores.

Every method of this kind moves x = g(theta), whether g is a one-step generator, a scene or an image, along

    w(t) residual(x_t, t, condition),    x_t = alpha_t x + sigma_t eps,

where the residual compares what a teacher says of the noised sample with what something else says: the noise itself
(SDS), a second network that follows the samples (VSD, DMD), the teacher without the condition (CSD), or a mixture of
these (ESD). What differs beyond that is the weight, and whether a graph passes through the frozen networks: the
*directions* below must not record one, the *divergences* need it.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.diffusion.predictions import Prediction, from_data_and_noise
from limbeck.diffusion.schedules import Schedule, along

Items = Float[Tensor, "items *shape"]
PerItem = Float[Tensor, " items"]
Weight = Literal["sigma2", "sigma_alpha", "uniform", "alpha_ratio"]


def inject_gradient(
    x: Items, direction: Items, reduction: Literal["mean", "sum_over_items"] = "mean"
) -> Float[Tensor, ""]:
    """A loss whose gradient in x is the direction, divided by all its numbers ("mean") or by the items alone.

    Its value is half the mean (or sum over items) of the squared direction. Entries that are not finite push nowhere,
    as in the public code of these methods: one bad pixel does not stop a scene.
    """
    direction = torch.nan_to_num(direction.detach(), nan=0.0, posinf=0.0, neginf=0.0)
    difference = x - (x - direction).detach()
    if reduction == "mean":
        return 0.5 * difference.square().mean()
    return 0.5 * difference.square().sum() / len(x)


def time_weight(kind: Weight, t: PerItem, schedule: Schedule) -> PerItem:
    """w(t) of a residual between predictions of noise: sigma^2 (DreamFusion), sigma alpha, 1, or sigma / alpha."""
    alpha, sigma = schedule.alpha(t.double()), schedule.sigma(t.double())
    return {
        "sigma2": sigma.square(),
        "sigma_alpha": sigma * alpha,
        "uniform": torch.ones_like(sigma),
        "alpha_ratio": sigma / alpha,
    }[kind]


def noise_residual(teacher: Prediction, other: Prediction | Items) -> Items:
    """eps_teacher - eps_other, where the other is a prediction or the noise itself; the residual of SDS, VSD and ESD.

    sigma_t times the score of the other minus that of the teacher: descending along it raises the teacher's density.

    Source: Poole et al., *DreamFusion*, 2022 (noise itself); Wang et al., *ProlificDreamer*, 2023 (a second network).
    """
    return teacher.eps - (other.eps if isinstance(other, Prediction) else other)


def entropic(camera: Prediction, free: Prediction, weight: float) -> Prediction:
    """weight times the camera-free prediction, plus 1 - weight times the one that knows the camera.

    Guidance between the two of scale 1 - weight (`guidance_scale_lora` in public code); 0 leaves ProlificDreamer.

    Source: Wang et al., *Taming Mode Collapse in Score Distillation*, 2024, arXiv 2401.00909.
    """
    value = torch.lerp(camera.value, free.value, weight)
    return Prediction(value, camera.kind, camera.x_t, camera.t, camera.schedule)


def distribution_direction(
    x: Items,
    teacher: Prediction,
    fake: Prediction,
    weight: PerItem | None = None,
    normalise: bool = True,
    floor: float = 0.0,
) -> Items:
    """(D_fake - D_teacher) / mean |x - D_teacher|: the direction of distribution matching, in data space.

    Args:
        x: samples that were noised.
        teacher: of the noised samples, guided or not.
        fake: of the network that follows the samples.
        weight: further factor an item, such as h(r) of an f-divergence.
        normalise: divide by each item's mean distance to the teacher's x0.
        floor: added to that distance.

    Source: Yin et al., *Improved Distribution Matching Distillation*, 2024, arXiv 2405.14867.
    """
    direction = fake.x0 - teacher.x0
    if normalise:
        size = (x - teacher.x0).abs().flatten(1).mean(1) + floor
        direction = direction / along(size, x)
    return direction if weight is None else along(weight, x) * direction


FakeLoss = Literal["prediction", "eps", "x0", "edm"]
"""The error by which a network follows the samples: in what it predicts, in noise, in data, or EDM's weighted one."""


def denoising_error(
    prediction: Prediction, x0: Items, noise: Items, kind: FakeLoss, sigma_data: float = 0.5
) -> PerItem:
    """Mean squared error of a prediction at alpha x0 + sigma noise, one number an item.

    "edm" is the error in data times (sigma / alpha)^-2 + sigma_data^-2 (Karras et al., 2022).
    """
    if kind == "x0" or kind == "edm":
        error = (prediction.x0 - x0).square().flatten(1).mean(1)
        if kind == "x0":
            return error
        power = torch.exp(2 * prediction.schedule.log_snr(prediction.t.double())) + sigma_data**-2
        return power.to(error.dtype) * error
    target_kind = prediction.kind if kind == "prediction" else "eps"
    target = from_data_and_noise(x0, noise, target_kind, prediction.t, prediction.schedule)
    return (prediction.as_kind(target_kind) - target).square().flatten(1).mean(1)


def pseudo_huber_slope(c: float) -> Callable[[Items], Items]:
    """d'(y) = y / sqrt(|y|^2 + c^2) of the distance sqrt(|y|^2 + c^2) - c, the norm over all of an item."""

    def slope(y: Tensor) -> Tensor:
        return y / along((y.flatten(1).square().sum(1) + c**2).sqrt(), y)

    return slope


def squared_slope(y: Items) -> Items:
    """d'(y) = 2 y of the squared norm."""
    return 2 * y


def power_slope(p: float) -> Callable[[Items], Items]:
    """d'(y) = p |y|^(p-2) y of the distance |y|^p, p at least 1."""

    def slope(y: Tensor) -> Tensor:
        size = y.flatten(1).square().sum(1).clamp(min=1e-20).sqrt()
        return along(p * size ** (p - 2), y) * y

    return slope


def exponential_slope(c: float) -> Callable[[Items], Items]:
    """d'(y) = 2 y exp(|y|^2 / c^2) / c^2 of the distance exp(|y|^2 / c^2) - 1; beyond e^20 it grows with |y| alone."""

    def slope(y: Tensor) -> Tensor:
        power = (y.flatten(1).square().sum(1) / c**2).clamp(max=20.0)
        return along(2 / c**2 * power.exp(), y) * y

    return slope


def score_divergence(
    x: Items, teacher: Prediction, fake: Prediction, slope: Callable[[Items], Items] = squared_slope
) -> PerItem:
    """A loss an item with the gradient of E d(S_fake - S_teacher), in data space; the graph must pass through both.

    -<d'(delta), D_fake - x>, delta = D_fake - D_teacher, for any distance d between scores. Networks' parameters are
    frozen, but gradients flow through their inputs: computed without a graph it is a different loss.

    Source: Luo et al., *Score Implicit Matching*, 2024, arXiv 2410.16794.
    """
    delta = fake.x0 - teacher.x0
    return -(slope(delta) * (fake.x0 - x)).flatten(1).sum(1)


def identity_distillation(x: Items, teacher: Prediction, fake: Prediction, alpha: float = 1.2) -> PerItem:
    """SiD's loss an item: <D_t - D_f, (D_t - x) - alpha (D_t - D_f)> / mean |x - D_t|, the divisor without a graph.

    At alpha 1 it is the squared score divergence up to the divisor.

    Source: Zhou et al., *Score identity Distillation*, 2024, arXiv 2404.04057.
    """
    delta = teacher.x0 - fake.x0
    size = (x - teacher.x0).detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    return (delta * ((teacher.x0 - x) - alpha * delta)).flatten(1).sum(1) / size
