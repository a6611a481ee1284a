"""Guided paths of a teacher's sampler, made once for each item and kept with what the teacher said on the way."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.durable import write_json
from limbeck.core.errors import IncompatibleError
from limbeck.diffusion.denoiser import Condition, Denoiser, NetworkDenoiser
from limbeck.diffusion.ports import whole_output
from limbeck.diffusion.predictions import Prediction
from limbeck.diffusion.steps import ddim_step, stochastic_ddim_step


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a guided teacher says at noisy items.

    Attributes:
        states: noisy items (items, ...).
        targets: its guided prediction, and after it the variance that it learned, if that is taught.
        weights: weight of each item's error (items,).
    """

    states: Tensor
    targets: Tensor
    weights: Tensor


def walk(
    teach: Callable[[Tensor, Tensor], tuple[Prediction, Lesson]],
    x: Tensor,
    times: Tensor,
    noise: Callable[[int], Tensor] | None = None,
) -> Iterator[Lesson]:
    """The lessons along a path from noise x (items, ...) down falling times, one at each but the last.

    `solvers` draw their noise from torch's stream, and `trajectories.record` keeps predictions alone; here noise is an
    item's own, and lessons hold more.

    Args:
        teach: the guided prediction at (x_t, t), which the path follows, and the lesson.
        x: on the scale of the schedule.
        times: (steps + 1,), float64.
        noise: standard normal (items, ...) of step j for DDPM's ancestral steps; DDIM's if absent.
    """
    for number, (t, s) in enumerate(pairwise(times)):
        prediction, lesson = teach(x, t.expand(len(x)))
        yield lesson
        x = ddim_step(prediction, s) if noise is None else stochastic_ddim_step(prediction, s, 1.0, noise(number))


def whole_prediction(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, condition: Condition
) -> tuple[Prediction, Tensor | None]:
    """A prediction, and the channels (items, ...) of the learned variance, None where the network has learned none."""
    if not isinstance(denoiser, NetworkDenoiser):
        return denoiser(x_t, t, condition), None
    made, schedule, channels = denoiser.process.parameterisation, denoiser.schedule, x_t.shape[1]
    seen, time = made.inputs(x_t, t, schedule)
    output = whole_output(denoiser.network, seen, time, condition)
    output = output.to(torch.promote_types(output.dtype, torch.float32))
    learned = output.ndim == x_t.ndim and output.shape[1] == 2 * channels
    value, kind = made.prediction(output[:, :channels] if learned else output, x_t, t, schedule)
    return Prediction(value, kind, x_t, t, schedule), output[:, channels:] if learned else None


def error_weight(loss: str, conditional: Prediction, guided: Prediction) -> Tensor:
    """Weight (items,) of each item's error: |1 - cos(eps_c, eps_g)| / 2 for "cos", sigma_t for "noise", else 1."""
    if loss == "noise":
        return guided.schedule.sigma(guided.t).to(guided.x_t)
    if loss == "cos":
        turned = torch.cosine_similarity(conditional.eps.flatten(1), guided.eps.flatten(1))
        return 0.5 * (1 - turned).abs()
    return guided.x_t.new_ones(len(guided.x_t))


class PathBank(nn.Module):
    """The lessons of one path for each item, filled in as items come by.

    In memory they are buffers, so that checkpoints hold them and a resumed run goes on with the very same paths. As
    integers of the same bits: buffers of numbers are averaged over ranks and follow the method's precision. In a folder
    they are files mapped into memory, which checkpoints leave out.

    Args:
        items: how many.
        steps: lessons of each.
        lesson: one that shows shapes.
        half: keep states and targets in float16.
        folder: where the files are; memory if absent.
        about: what the paths depend on; a folder of others is refused.

    Raises:
        IncompatibleError: the folder holds other paths.
    """

    def __init__(
        self, items: int, steps: int, lesson: Lesson, half: bool, folder: Path | None, about: Mapping[str, Any]
    ) -> None:
        super().__init__()
        kept = torch.float16 if half else torch.float32
        self.kinds = {"states": kept, "targets": kept, "weights": torch.float32, "known": torch.bool}
        shapes: dict[str, tuple[int, ...]] = {
            "states": (items, steps, *lesson.states.shape[1:]),
            "targets": (items, steps, *lesson.targets.shape[1:]),
            "weights": (items, steps),
            "known": (items,),
        }
        if folder is not None:
            _claim(folder, {**about, "shapes": {name: list(shape) for name, shape in shapes.items()}, "half": half})
        for name, shape in shapes.items():
            kind = {torch.float16: torch.int16, torch.float32: torch.int32}.get(self.kinds[name], torch.bool)
            if folder is None:
                self.register_buffer(name, torch.zeros(shape, dtype=kind))
            else:
                count = torch.Size(shape).numel()
                mapped = torch.from_file(str(folder / f"{name}.bin"), shared=True, size=count, dtype=kind)
                setattr(self, name, mapped.view(shape))

    def missing(self, index: Tensor) -> Tensor:
        """Rows of `index` (items,) whose path was not made yet."""
        known: Tensor = getattr(self, "known")  # noqa: B009
        return (~known[index.to(known.device)]).nonzero().squeeze(1).to(index.device)

    @torch.no_grad()
    def store(self, index: Tensor, lessons: Iterator[Lesson]) -> None:
        """Keeps the paths of the items at `index`, lesson by lesson."""
        for step, lesson in enumerate(lessons):
            for name in ("states", "targets", "weights"):
                place, value = getattr(self, name), getattr(lesson, name).to(self.kinds[name])
                place[index.to(place.device), step] = value.view(place.dtype).to(place.device)
        known = getattr(self, "known")  # noqa: B009
        known[index.to(known.device)] = True

    def recall(self, index: Tensor, step: Tensor, like: Tensor) -> Lesson:
        """The lessons of the items at `index` at one step each (items,), in the precision of `like`."""
        found = {}
        for name in ("states", "targets", "weights"):
            place = getattr(self, name)
            bits = place[index.to(place.device), step.to(place.device)]
            found[name] = bits.view(self.kinds[name]).to(like)
        return Lesson(**found)


def _claim(folder: Path, about: dict[str, Any]) -> None:
    """Notes in a folder what its paths depend on, or checks what is noted there."""
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "paths.json"
    if not note.is_file():
        write_json(note, about)
    elif json.loads(note.read_bytes()) != about:
        raise IncompatibleError(f"{folder} holds guided paths of another training", "name another folder, or empty it")
