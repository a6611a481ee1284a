"""Editing with a denoiser of few steps or many: changing a picture, filling holes, and carrying it to another style."""

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.diffusion.denoiser import NONE, Condition, Denoiser
from limbeck.diffusion.generation import generate, guided_model
from limbeck.diffusion.predictions import Prediction
from limbeck.diffusion.progressive import encoding_times
from limbeck.diffusion.schedules import Schedule
from limbeck.diffusion.solvers import Model, Solver, solve
from limbeck.diffusion.steps import renoise

Items = Float[Tensor, "items *shape"]


def encode(
    encoder: Denoiser, x: Items, condition: Condition = NONE, *, steps: int | None = None, guidance: float = 1.0
) -> Items:
    """The noise from which `generate` would draw these items: DDIM steps from data to noise.

    Args:
        encoder: a distilled encoder, or any denoiser with many steps.
        x: data (items, ...).
        condition: of each item.
        steps: of the encoder; those of its sampling if absent.
        guidance: the scale g; papers encode without guidance.
    """
    times = encoding_times(encoder.schedule, steps or encoder.sampling.steps)
    return solve(guided_model(encoder, condition, guidance), x, times, "ddim") / encoder.schedule.noise_scale


def restyle(
    encoder: Denoiser, decoder: Denoiser, x: Items, source: Condition = NONE, target: Condition = NONE
) -> Items:
    """Carries items to another style: encoded under one model or condition, drawn by another (Meng et al., 2023).

    Both take the steps of their own sampling.

    Args:
        encoder: of the style that the items have.
        decoder: of the style that they get.
        x: data (items, ...).
        source: condition of each item as it is.
        target: condition of each item as it is to be.
    """
    return generate(decoder, encode(encoder, x, source), target)


def edit(
    denoiser: Denoiser,
    x: Items,
    noise: Items,
    condition: Condition,
    *,
    redone: int,
    steps: int | None = None,
    guidance: float | None = None,
    solver: Solver | None = None,
) -> Items:
    """SDEdit: noise is added to the items, and the last steps of the sampler are done again (Meng et al., 2022).

    Args:
        denoiser: what predicts.
        x: data (items, ...).
        noise: standard normal (items, ...).
        condition: of each item as it is to be.
        redone: how many steps; the more, the less is left of the items.
        steps: of the whole sampler, on whose grid the edit starts; those of its sampling if absent.
        guidance: the scale g.
        solver: name in `solvers.SOLVERS`.

    Raises:
        ValueError: fewer than one step is redone, or more than there are.
    """
    sampling = denoiser.sampling
    times = sampling.times_for(denoiser.schedule, steps)
    if not 1 <= redone < len(times):
        raise ValueError(f"an edit redoes from 1 to all {len(times) - 1} steps, not {redone}")
    times = times[-redone - 1 :]
    start = renoise(x, times[0], denoiser.schedule, noise)
    return solve(guided_model(denoiser, condition, guidance), start, times, solver or sampling.solver)


def inpaint(
    denoiser: Denoiser,
    known: Items,
    mask: Tensor,
    noise: Items,
    condition: Condition = NONE,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    solver: Solver | None = None,
    fresh: bool = False,
) -> Items:
    """Fills holes: before every prediction, and at the end, what is known replaces what was drawn there.

    A network that was trained for this, which sees mask and rest as further channels, needs no replacement: give it the
    condition `channels`.

    Args:
        denoiser: what predicts.
        known: data (items, ...), whatever value in the holes.
        mask: 1 where they are known, 0 in the holes, in between to mix; broadcast against the items.
        noise: standard normal (items, ...), to start from.
        condition: of each item.
        steps: of the sampler.
        guidance: the scale g.
        solver: name in `solvers.SOLVERS`.
        fresh: draw new noise for what is known at every step; else it keeps the noise of the start.
    """
    sampling, schedule = denoiser.sampling, denoiser.schedule
    asked = _replacing(guided_model(denoiser, condition, guidance), known, mask, None if fresh else noise, schedule)
    times = sampling.times_for(schedule, steps)
    drawn = solve(asked, noise * schedule.noise_scale, times, solver or sampling.solver)
    return mask * known + (1 - mask) * drawn


def _replacing(model: Model, known: Tensor, mask: Tensor, noise: Tensor | None, schedule: Schedule) -> Model:
    """A model that sees what is known in its place; solvers step from what it saw."""

    def asked(x_t: Tensor, t: Tensor) -> Prediction:
        there = renoise(known, t, schedule, torch.randn_like(known) if noise is None else noise)
        return model(mask * there + (1 - mask) * x_t, t)

    return asked
