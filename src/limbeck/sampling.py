"""Drawing samples from the generator that a run left."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.core.errors import IncompatibleError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from limbeck.core.method import DataInfo
    from limbeck.core.run import Run

MOST = 65536
"""Samples of one call at most."""


def sample(
    run: "Path | str | Run",
    items: int = 64,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    labels: Sequence[int] = (),
    seed: int = 0,
    out: Path | str | None = None,
    batch_size: int = 256,
    model: "nn.Module | None" = None,
) -> "Tensor":
    """Draws images from the generator of a finished run, and writes them as one picture.

    Args:
        run: a run or its folder.
        items: how many.
        steps: of the solver; as many as the student was made for if absent.
        guidance: scale g; the student's own if absent, 1 for one that has learned its guidance.
        labels: classes to ask for, in turn; all of the data's if absent.
        seed: of the noise; equal noise for equal seeds, whatever the number of items.
        out: PNG to write, rows of images; nothing is written if absent.
        batch_size: images at a time.
        model: an object to fill with the result, for classes of your own.

    Returns:
        Images (items, channels, height, width) in [0, 1].

    Raises:
        UsageError: no such run, it is not finished, or its student generates nothing.
    """
    if not 1 <= items <= MOST:
        raise UsageError(f"between 1 and {MOST} samples can be drawn, not {items}")
    if out is not None and not Path(out).expanduser().parent.is_dir():
        raise UsageError(f"there is no folder {Path(out).parent}", "choose another place with --out")
    from limbeck.core.run import Run
    from limbeck.finished import load

    opened = Run.open(Path(run)) if isinstance(run, str | Path) else run
    student = load(opened, model)
    images = draw(
        student, opened, items, steps=steps, guidance=guidance, labels=labels, seed=seed, batch_size=batch_size
    )
    if out is not None:
        _write(images, Path(out).expanduser(), columns=_columns(_info(opened), items))
    return images


def draw(
    student: "nn.Module",
    run: "Run",
    items: int,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    labels: Sequence[int] = (),
    seed: int = 0,
    batch_size: int = 256,
) -> "Tensor":
    """Images (items, channels, height, width) in [0, 1] from a generator, in the shape of a run's data; see `sample`.

    Raises:
        UsageError: the student generates nothing, or there is no such class.
    """
    import torch

    from limbeck.diffusion.denoiser import denoiser_of
    from limbeck.diffusion.generation import generate

    denoiser, info = _denoiser(student, denoiser_of), _info(run)
    asked = _labels(labels, info, items)
    parts = []
    with torch.no_grad():
        for start in range(0, items, batch_size):
            rows = torch.arange(start, min(start + batch_size, items))
            condition = {} if asked is None else {"label": asked[rows]}
            noise = _noise(info, rows, seed)
            parts.append(generate(denoiser, noise, condition, steps=steps, guidance=guidance))
    return _as_images(torch.cat(parts), student)


def _denoiser(student: "nn.Module", wrap: Any) -> Any:
    try:
        return wrap(student)
    except ValueError as error:
        raise IncompatibleError(f"the student draws no samples: {error}", "sample from a run of a generator") from error


def _info(run: "Run") -> "DataInfo":
    """What the run's data look like: their shape and classes."""
    from limbeck.data.open import open_data

    return open_data(run.recipe().data).train.info()


def _labels(labels: Sequence[int], info: "DataInfo", items: int) -> "Tensor | None":
    import torch

    if not info.classes:
        if labels:
            raise UsageError("the run's data have no classes to ask for")
        return None
    wrong = [label for label in labels if not 0 <= label < info.classes]
    if wrong:
        raise UsageError(f"there is no class {wrong[0]}", f"classes are 0 to {info.classes - 1}")
    chosen = torch.tensor(list(labels) or list(range(info.classes)))
    return chosen[torch.arange(items) % len(chosen)]


def _noise(info: "DataInfo", rows: "Tensor", seed: int) -> "Tensor":
    from limbeck.core.batch import Batch
    from limbeck.metrics.generation import noise_for

    shape = info.example["image"].shape[1:]
    return noise_for(Batch({"image": info.example["image"].new_empty(len(rows), *shape), "index": rows}), seed)


def _as_images(samples: "Tensor", student: "nn.Module") -> "Tensor":
    """Samples in [0, 1], by the normalisation that the student was trained with."""
    from limbeck.models.normalisation import normalisation_of

    mean, std = (samples.new_tensor(values).view(-1, 1, 1) for values in normalisation_of(student) or ([0.5], [0.5]))
    return (samples * std + mean).clamp(0, 1)


def _columns(info: "DataInfo", items: int) -> int:
    """A column a class where that suits, else a square."""
    return info.classes if 2 <= info.classes <= 20 and items >= info.classes else math.ceil(math.sqrt(items))


def _write(images: "Tensor", path: Path, columns: int) -> None:
    from limbeck.core.durable import write_bytes
    from limbeck.report.pictures import grid, png

    write_bytes(path, png(grid(images, columns), longest=None))
