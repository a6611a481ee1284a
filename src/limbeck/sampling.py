"""Drawing samples from the generator that a run left."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from limbeck.core.errors import IncompatibleError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from limbeck.canvas import Canvas
    from limbeck.core.run import Run
    from limbeck.data.source import Source
    from limbeck.rendering.scene import Scene
    from limbeck.synthesis.synthetic_set import SyntheticSet

MOST = 65536
"""Samples of one call at most."""

_MOST_LATENTS = 8
"""Latents that are drawn at a time at most: their networks are large."""


def sample(
    run: "Path | str | Run",
    items: int = 64,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    labels: Sequence[int] = (),
    prompts: Sequence[str] = (),
    seed: int = 0,
    out: Path | str | None = None,
    batch_size: int = 256,
    model: "nn.Module | None" = None,
    data: "Source | None" = None,
) -> "Tensor":
    """Draws images from the generator of a finished run, and writes them as one picture.

    Students of latent diffusion pipelines are decoded by their pipeline's autoencoder. A scene is shown once around,
    from as many cameras as items are asked for, and as an animation beside the picture. Of a synthetic set it is the
    images themselves, a row a class, as many of each as there is room for.

    Args:
        run: a run or its folder.
        items: how many.
        steps: of the solver; as many as the student was made for if absent.
        guidance: scale g; the student's own if absent, 1 for one that has learned its guidance.
        labels: classes to ask for, in turn; all of the data's if absent.
        prompts: texts to ask for, in turn, for students of text-to-image pipelines; the captions of the run's data if
            absent.
        seed: of the noise; equal noise for equal seeds, whatever the number of items.
        out: PNG to write, rows of images; nothing is written if absent.
        batch_size: images at a time.
        model: an object to fill with the result, for classes of your own.
        data: the run's data, where they were given as objects.

    Returns:
        Images (items, channels, height, width) in [0, 1].

    Raises:
        UsageError: no such run, it is not finished, its student generates nothing, or not what is asked for; nothing
            was written.
    """
    from limbeck.core.run import Run

    opened = Run.open(Path(run)) if isinstance(run, str | Path) else run
    if out is not None and not Path(out).expanduser().parent.is_dir():
        raise UsageError(f"there is no folder {Path(out).parent}", "choose another place with --out")
    from limbeck.finished import load

    _check(items, steps, guidance, batch_size)
    student = load(opened, model)
    if _is_scene(student):
        from limbeck.showing import show_scene

        return show_scene(student, items, None if out is None else Path(out).expanduser())
    if _is_set(student):
        from limbeck.showing import show_set

        return show_set(student, items, None if out is None else Path(out).expanduser())
    canvas = _canvas(student, opened, labels, prompts, data)
    images = _drawn(student, canvas, items, steps, guidance, seed, batch_size)
    if out is not None:
        from limbeck.canvas import columns_of

        _write(images, Path(out).expanduser(), columns_of(canvas, items))
    return images


def draw(
    student: "nn.Module",
    run: "Run",
    items: int,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    labels: Sequence[int] = (),
    prompts: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 256,
    data: "Source | None" = None,
) -> "Tensor":
    """Images (items, channels, height, width) in [0, 1] from a generator, as a run's data suggest; see `sample`.

    Raises:
        UsageError: the student generates nothing, or not what is asked for.
    """
    _check(items, steps, guidance, batch_size)
    canvas = _canvas(student, run, labels, prompts, data)
    return _drawn(student, canvas, items, steps, guidance, seed, batch_size)


def _is_scene(student: "nn.Module") -> "TypeGuard[Scene]":
    from limbeck.rendering.scene import Scene

    return isinstance(student, Scene)


def _is_set(student: "nn.Module") -> "TypeGuard[SyntheticSet]":
    from limbeck.synthesis.synthetic_set import SyntheticSet

    return isinstance(student, SyntheticSet)


def _check(items: int, steps: int | None, guidance: float | None, batch_size: int) -> None:
    if not 1 <= items <= MOST:
        raise UsageError(f"between 1 and {MOST} samples can be drawn, not {items}")
    if steps is not None and steps < 1:
        raise UsageError(f"a sampler makes one step or more, not {steps}")
    if guidance is not None and not 0 <= guidance < math.inf:
        raise UsageError(f"a guidance scale is 0 or more, not {guidance}")
    if batch_size < 1:
        raise UsageError(f"at least one image is drawn at a time, not {batch_size}")


def _canvas(
    student: "nn.Module", run: "Run", labels: Sequence[int], prompts: Sequence[str], data: "Source | None"
) -> "Canvas":
    from limbeck.canvas import Canvas

    _denoiser(student)  # before data and encoders are opened
    return Canvas(student, run.recipe().data, data, labels, prompts)


def _denoiser(student: "nn.Module") -> Any:
    from limbeck.diffusion.denoiser import denoiser_of

    try:
        return denoiser_of(student)
    except ValueError as error:
        raise IncompatibleError(f"the student draws no samples: {error}", "sample from a run of a generator") from error


def _drawn(
    student: "nn.Module",
    canvas: "Canvas",
    items: int,
    steps: int | None,
    guidance: float | None,
    seed: int,
    batch_size: int,
) -> "Tensor":
    import torch

    from limbeck.diffusion.generation import generate
    from limbeck.diffusion.steps import drawing_from
    from limbeck.metrics.generation import step_noise
    from limbeck.models.modes import device_of, evaluating

    denoiser, device = _denoiser(student), device_of(student)
    at_a_time = batch_size if canvas.encoder is None else min(batch_size, _MOST_LATENTS)
    parts = []
    with evaluating(student):
        for rows in torch.arange(items).split(at_a_time):
            condition = {name: value.to(device) for name, value in canvas.condition(rows).items()}
            noise = canvas.noise(rows, seed).to(device)
            try:
                with drawing_from(step_noise(rows, seed)):
                    made = generate(denoiser, noise, condition, steps=steps, guidance=guidance)
            except ValueError as error:  # more steps than a schedule has times, or guidance without a null condition
                raise IncompatibleError(f"no samples can be drawn in this way: {error}") from error
            parts.append(canvas.images(made))
    return torch.cat(parts)


def _write(images: "Tensor", path: Path, columns: int) -> None:
    from limbeck.core.durable import write_bytes
    from limbeck.report.pictures import grid, png

    write_bytes(path, png(grid(images, columns), longest=None))
