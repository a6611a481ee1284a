"""Trajectories of a sampler: recorded with what the model said on the way, and kept for training in a buffer."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from limbeck.diffusion.predictions import Kind, Prediction
from limbeck.diffusion.solvers import SOLVERS, Model, Solver


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The path of a batch from noise to data.

    Attributes:
        states: all states (times, items, ...), noise first.
        times: their falling times (times,), float64.
        predictions: what was predicted at each state but the last (times - 1, items, ...).
        kind: what kind of prediction that is.
    """

    states: Tensor
    times: Tensor
    predictions: Tensor
    kind: Kind


@torch.no_grad()
def record(
    model: Model,
    x: Float[Tensor, "items *shape"],
    times: Float[Tensor, " times"],
    solver: Solver = "ddim",
    *,
    kind: Kind = "x0",
    dtype: torch.dtype | None = None,
) -> Trajectory:
    """Runs a solver and keeps its states and predictions, without a graph.

    Args:
        model: what predicts, guided or not.
        x: noise (items, ...) at the first of the times.
        times: falling times, float64.
        solver: name in `solvers.SOLVERS`. Of solvers with two predictions a step, the one at its beginning is kept.
        kind: as what predictions are kept.
        dtype: what is kept in memory; as computed if absent. The solver itself goes on in the precision of x.
    """
    heard: list[Prediction] = []

    def listening(x_t: Tensor, t: Tensor) -> Prediction:
        heard.append(model(x_t, t))
        return heard[-1]

    times = times.to(x.device)
    states, predictions = [x.to(dtype or x.dtype)], []
    for state in SOLVERS[solver](listening, x, times):
        predictions.append(heard[0].as_kind(kind).to(dtype or state.dtype))
        states.append(state.to(dtype or state.dtype))
        heard.clear()
    return Trajectory(torch.stack(states), times, torch.stack(predictions), kind)


class ReplayBuffer(nn.Module):
    """The latest rows of what was seen, such as states with their times and conditions.

    Its tensors are buffers: checkpoints hold them, and training resumes exactly.

    Args:
        size: rows that are kept.
        rows: by name, a tensor (any number, ...) that shows shape and dtype of a row; its values are not kept.

    Raises:
        ValueError: no room for a row, or nothing to keep.
    """

    added: Tensor

    def __init__(self, size: int, rows: Mapping[str, Tensor]) -> None:
        super().__init__()
        if size < 1 or not rows:
            raise ValueError("a replay buffer keeps one row or more, of one tensor or more")
        self.size, self.names = size, tuple(rows)
        for name, example in rows.items():
            self.register_buffer(f"row_{name}", example.new_zeros(size, *example.shape[1:]))
        self.register_buffer("added", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        """Rows that are filled."""
        return min(int(self.added), self.size)

    @torch.no_grad()
    def add(self, rows: Mapping[str, Tensor]) -> None:
        """Keeps rows (count, ...) under all names, in place of the oldest where the buffer is full.

        Raises:
            ValueError: other names than the buffer's, or unequal numbers of rows.
        """
        counts = {len(value) for value in rows.values()}
        if rows.keys() != set(self.names) or len(counts) != 1:
            raise ValueError(f"a replay buffer of {', '.join(self.names)} takes as many rows of each")
        count = counts.pop()
        kept = min(count, self.size)  # more than fit would overwrite each other
        place = (self.added + torch.arange(count - kept, count, device=self.added.device)) % self.size
        for name, value in rows.items():
            store = self.get_buffer(f"row_{name}")
            store[place] = value[count - kept :].to(store)
        self.added += count

    def draw(self, items: int) -> dict[str, Tensor]:
        """Rows (items, ...) drawn evenly with replacement, from torch's stream.

        Raises:
            ValueError: the buffer is empty.
        """
        filled = len(self)
        if not filled:
            raise ValueError("the replay buffer is empty: add rows before drawing")
        place = torch.randint(filled, (items,), device=self.added.device)
        return {name: self.get_buffer(f"row_{name}")[place] for name in self.names}
