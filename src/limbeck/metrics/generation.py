"""How close a generator's samples are to data, and what they cost: quality never without evaluations and seconds."""

import time
from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.randomness import derive, generator
from limbeck.data.noise import ItemNoise
from limbeck.diffusion.denoiser import Condition, Denoiser, condition_of, denoiser_of
from limbeck.diffusion.generation import count_evaluations, generate
from limbeck.diffusion.steps import drawing_from
from limbeck.metrics.distances import Extractor, frechet_distance, pooled_pixels, sliced_wasserstein
from limbeck.models.modes import device_of, evaluating

if TYPE_CHECKING:
    from limbeck.data.source import Source

MOST = 2000
"""Samples that are drawn at most, so that a measurement takes seconds."""


def evaluate_generation(
    model: nn.Module,
    source: "Source",
    *,
    teacher: Any = None,
    batch_size: int = 256,
    pause: Callable[[], Any] | None = None,
    steps: int | None = None,
    extractor: Extractor = pooled_pixels,
) -> dict[str, int | float]:
    """Draws a sample for each item of a source, under its condition, and compares the two sets.

    All noise, that of random solvers too, is a function of the item's number, so that models are compared on the same.

    Args:
        model: a denoising network with a process.
        source: what to compare with; the first `MOST` items.
        teacher: a live teacher, whose samples from the same noise are compared one by one.
        batch_size: samples at a time.
        pause: called between batches; raises `Interrupted` when the run was asked to stop.
        steps: solver steps, where other than the process's.
        extractor: features in which the Fréchet distance is taken.

    Returns:
        `items`; `sliced_wasserstein` and `frechet` to the source's items; for items with classes `judged`, the share of
        samples in which a logistic regression, fitted to the source, sees the class that was asked for; `evaluations`
        of the network and `seconds_per_sample`; with a teacher `endpoint_error`, the mean squared difference.
    """
    denoiser = denoiser_of(model)
    parent = None if teacher is None else denoiser_of(teacher.model)
    device = device_of(model)
    real, drawn, theirs, labels, seconds = [], [], [], [], 0.0
    condition: Condition = {}
    with evaluating(model):
        for batch in _batches(source, min(len(source), MOST), batch_size):
            if pause is not None:
                pause()
            batch = batch.to(device)
            condition, noise = _condition(batch, denoiser, source), noise_for(batch)
            begun = time.perf_counter()
            with drawing_from(step_noise(batch["index"])):
                drawn.append(generate(denoiser, noise, condition, steps=steps))
            _wait(device)
            seconds += time.perf_counter() - begun
            real.append(batch["image"])
            labels.append(batch["label"] if "label" in batch else batch["index"].new_full((batch.size,), -100))
            if parent is not None:
                with drawing_from(step_noise(batch["index"])):
                    theirs.append(generate(parent, noise, _condition(batch, parent, source)))
    samples, data = torch.cat(drawn), torch.cat(real)
    figures: dict[str, int | float] = {
        "items": len(samples),
        "sliced_wasserstein": sliced_wasserstein(samples, data),
        "frechet": frechet_distance(extractor(samples), extractor(data)),
        **_judged(samples, data, torch.cat(labels)),
        "evaluations": count_evaluations(denoiser, condition, steps),
        "seconds_per_sample": seconds / len(samples),
    }
    if parent is not None:
        figures["endpoint_error"] = float((samples - torch.cat(theirs)).square().mean())
    return figures


def evaluate_few_steps(model: nn.Module, source: "Source", pause: Callable[[], Any] | None = None) -> dict[str, Any]:
    """The figures of a consistency model at one, two and four steps, by number of steps as text; empty for others.

    Of other few-step generators each number of steps is a network of its own.
    """
    if denoiser_of(model).sampling.solver not in ("consistency", "tcd"):
        return {}
    return {str(steps): evaluate_generation(model, source, pause=pause, steps=steps) for steps in (1, 2, 4)}


def noise_for(batch: Batch, seed: int = 0) -> Tensor:
    """Standard normal noise in the shape of a batch's images, each item's a function of its number alone."""
    image = batch["image"]
    shape = image.shape[1:]
    rows = [torch.randn(shape, generator=generator(seed, "noise", int(item))) for item in batch["index"]]
    return torch.stack(rows).to(image)


def step_noise(items: Tensor, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """What random solvers draw in their steps, one after the other, for `drawing_from`: by item number (items,)."""
    noise, step = ItemNoise(derive(seed, "steps"), items), count()

    def draw(like: Tensor) -> Tensor:
        noise.items = noise.items.to(like.device)
        return noise.normal(str(next(step)), like)

    return draw


def _condition(batch: Batch, denoiser: Denoiser, source: "Source") -> Condition:
    process = getattr(denoiser, "process", None)  # the null label of an analytic denoiser is -1
    condition = dict(condition_of(batch, -1 if process is None else process.null_label))
    if not source.classes:
        condition.pop("label", None)
    return condition


def _judged(samples: Tensor, data: Tensor, labels: Tensor) -> dict[str, float]:
    """Whether samples look like their classes to a judge that knows the data alone."""
    known = labels >= 0
    if len(labels[known].unique()) < 2:
        return {}
    from sklearn.linear_model import LogisticRegression

    pooled, truth = pooled_pixels(data)[known].double().cpu().numpy(), labels[known].cpu().numpy()
    judge = LogisticRegression(max_iter=1000).fit(pooled, truth)
    return {"judged": float(judge.score(pooled_pixels(samples)[known].double().cpu().numpy(), truth))}


def _batches(source: "Source", items: int, size: int) -> Any:
    for start in range(0, items, size):
        yield source.fetch(torch.arange(start, min(start + size, items)))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
