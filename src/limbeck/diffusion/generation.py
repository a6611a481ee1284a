"""Drawing samples from a denoiser, in the way that its process says or another."""

import torch
from torch import Tensor

from limbeck.diffusion.denoiser import NONE, Condition, Denoiser
from limbeck.diffusion.guidance import guided
from limbeck.diffusion.predictions import Prediction
from limbeck.diffusion.solvers import Model, Solver, count_predictions, solve


def generate(
    denoiser: Denoiser,
    noise: Tensor,
    condition: Condition = NONE,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    solver: Solver | None = None,
) -> Tensor:
    """Samples (items, ...) from standard normal noise (items, ...).

    Args:
        denoiser: what predicts; it says how samples are drawn from it, where the other arguments do not.
        noise: standard normal; brought to the scale of the schedule here.
        condition: of each item.
        steps: of the solver.
        guidance: the scale g.
        solver: name in `solvers.SOLVERS`.
    """
    sampling = denoiser.sampling
    times = sampling.times_for(denoiser.schedule, steps)
    model = guided_model(denoiser, condition, guidance)
    return solve(model, noise * denoiser.schedule.noise_scale, times, solver or sampling.solver)


def guided_model(denoiser: Denoiser, condition: Condition = NONE, guidance: float | None = None) -> Model:
    """A denoiser under one condition and guidance scale, as solvers take it; the denoiser's own scale if absent.

    Networks that take the scale as an input are told it; of others, two predictions are combined in one call.
    """
    scale = denoiser.sampling.guidance if guidance is None else guidance

    def model(x_t: Tensor, t: Tensor) -> Prediction:
        if denoiser.guidance_input:
            told = torch.full((len(x_t),), float(scale), device=x_t.device)
            return denoiser(x_t, t, {**condition, "guidance": told})
        return guided(denoiser, x_t, t, condition, scale)

    return model


def count_evaluations(
    denoiser: Denoiser, condition: Condition, steps: int | None = None, guidance: float | None = None
) -> int:
    """Network evaluations that a sample costs (NFE): guidance by two predictions counts double."""
    sampling = denoiser.sampling
    count = len(sampling.times_for(denoiser.schedule, steps)) - 1
    scale = sampling.guidance if guidance is None else guidance
    pair = bool(condition) and scale != 1 and not denoiser.guidance_input
    return count_predictions(sampling.solver, count) * (2 if pair else 1)
