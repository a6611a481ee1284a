"""Couplings of noise and data: where a sampler leads from each item's noise, made once and kept."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from limbeck.diffusion.adaptive import rk45
from limbeck.diffusion.denoiser import NONE, Condition, Denoiser
from limbeck.diffusion.generation import generate, guided_model
from limbeck.diffusion.rectified import as_flow, rectified_euler
from limbeck.diffusion.schedules import along
from limbeck.diffusion.solvers import Solver

PairSolver = Solver | Literal["rk45"]
_LAST = 1e-3  # where RK45 ends before its step into clean data: predictions of x0 have no velocity at t = 0


@dataclass(frozen=True)
class PairSampling:
    """How data are made from noise. Another guidance makes another coupling, so all of it belongs to the pairs.

    Attributes:
        solver: a deterministic one of `solvers.SOLVERS`, or "rk45", which chooses its steps by itself.
        steps: of all other solvers.
        guidance: the scale g.
        eps: where tau starts, for "rk45" and with `compat`.
        compat: Euler's method as the authors of rectified flow run it; see `rectified_euler`.
        tolerance: absolute and relative, of "rk45".
    """

    solver: PairSolver = "euler"
    steps: int = 25
    guidance: float = 1.0
    eps: float = 1e-3
    compat: bool = False
    tolerance: float = 1e-5


@torch.no_grad()
def endpoints(
    denoiser: Denoiser,
    noise: Float[Tensor, "items *shape"],
    condition: Condition = NONE,
    how: PairSampling | None = None,
) -> Float[Tensor, "items *shape"]:
    """X1 (items, ...): where the denoiser's flow leads from the noise X0, itself the start of the path.

    Args:
        denoiser: of any schedule.
        noise: standard normal.
        condition: of each item.
        how: the solver and its settings.

    Raises:
        ValueError: guidance by a denoiser that cannot do without its condition.
    """
    how = how or PairSampling()
    if how.solver != "rk45" and not how.compat:
        return generate(denoiser, noise, condition, steps=how.steps, guidance=how.guidance, solver=how.solver)
    model = guided_model(as_flow(denoiser), condition, how.guidance)
    if how.compat:
        return rectified_euler(model, noise, how.steps, how.eps, compat=True)
    last = rk45(lambda x, t: model(x, t).velocity, noise, 1 - how.eps, _LAST, how.tolerance, how.tolerance)
    times = torch.full((len(last),), _LAST, dtype=torch.float64, device=last.device)
    return last - along(times, last) * model(last, times).velocity


class PairBank(nn.Module):
    """The data end of one path for every pair, filled in as pairs come by; their noise is a function of their number.

    The data are buffers: checkpoints hold them, so that a resumed run goes on with the very same pairs. Each rank fills
    in what it meets; a checkpoint holds what the first one did, and the others make theirs again.

    Args:
        pairs: how many.
        example: tensor (any number, ...) that shows shape and precision of an item.
    """

    kept_per_rank = True
    data: Tensor
    known: Tensor

    def __init__(self, pairs: int, example: Tensor) -> None:
        super().__init__()
        self.register_buffer("data", example.new_zeros(pairs, *example.shape[1:]))
        self.register_buffer("known", torch.zeros(pairs, dtype=torch.bool))

    def missing(self, index: Int[Tensor, " items"]) -> Int[Tensor, " rows"]:
        """Rows of `index` whose pair was not made yet."""
        return (~self.known[index]).nonzero().squeeze(1)

    def store(self, index: Int[Tensor, " items"], data: Float[Tensor, "items *shape"]) -> None:
        """Keeps the data of the pairs at `index`."""
        self.data[index] = data.to(self.data)
        self.known[index] = True

    def recall(self, index: Int[Tensor, " items"]) -> Float[Tensor, "items *shape"]:
        """The data of the pairs at `index`, all of which were made."""
        return self.data[index]
