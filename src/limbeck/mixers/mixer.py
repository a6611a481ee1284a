"""What every mixer offers: all tokens at once, token by token with a state, and its matrix."""

from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

State = TypeVar("State")

PIECES = {"cpu": 512}
"""Tokens of one piece, by kind of device; 2^14 elsewhere."""


class Mixer(nn.Module):
    """Moves information between tokens.

    A mask (batch, length) is true at tokens and false at padding, which may be anywhere: padding never reaches a token,
    never touches the state, and its own output is 0.
    """

    def forward(
        self, hidden: Float[Tensor, "batch length width"], mask: Bool[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch length width"]:
        """All tokens at once."""
        return self.prefill(hidden, mask)[0]

    def prefill(
        self,
        hidden: Float[Tensor, "batch length width"],
        mask: Bool[Tensor, "batch length"] | None = None,
        state: Any = None,
    ) -> tuple[Float[Tensor, "batch length width"], Any]:
        """All tokens at once, after those that `state` remembers (none if absent), with the state after the last."""
        raise NotImplementedError

    def step(
        self, hidden: Float[Tensor, "batch few width"], state: Any
    ) -> tuple[Float[Tensor, "batch few width"], Any]:
        """The next token, or a few, with the state after them. The given state is left as it is."""
        return self.prefill(hidden, None, state)

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """The state before the first token.

        Args:
            batch: number of sequences.
            device: of the tensors; the parameters' own if absent.
            dtype: of the hidden states to come; the parameters' own if absent. Sums are kept in float32 or better.
        """
        raise NotImplementedError

    def materialize(
        self, hidden: Float[Tensor, "batch length width"], mask: Bool[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch heads length length"]:
        """The matrix by which each head mixes its values: row i holds what output i takes from each token.

        Rows and columns of padding are 0. Memory grows with the square of the length; for short sequences only.
        """
        raise NotImplementedError

    def _place(self, device: torch.device | str | None, dtype: torch.dtype | None) -> tuple[Any, torch.dtype]:
        parameter = next(self.parameters())
        return device or parameter.device, dtype or parameter.dtype


def select_rows(state: State, rows: Int[Tensor, " kept"] | Bool[Tensor, " batch"]) -> State:
    """A state of other sequences of the batch: by index (beams, may repeat) or by a mask (those that go on)."""
    changed = {name: value[rows] for name, value in _tensors(state).items()}
    return replace(state, **changed)  # type: ignore[type-var]


def state_bytes(state: Any) -> int:
    """Bytes that a state's tensors hold."""
    return sum(value.numel() * value.element_size() for value in _tensors(state).values())


def longest_piece(hidden: Float[Tensor, "batch length width"]) -> int:
    """Tokens to go through a mixer of constant state at once: all where gradients are recorded, else as many as suit
    the processor's caches, so that working memory does not grow with the length."""
    return hidden.shape[1] if torch.is_grad_enabled() else PIECES.get(hidden.device.type, 2**14)


def in_pieces(
    mixer: Mixer,
    hidden: Float[Tensor, "batch length width"],
    mask: Bool[Tensor, "batch length"] | None,
    state: Any,
    piece: int,
) -> tuple[Float[Tensor, "batch length width"], Any]:
    """A prefill a piece of the sequence at a time: the same up to rounding."""
    masks = [None] * -(-hidden.shape[1] // piece) if mask is None else mask.split(piece, 1)
    outputs = []
    for part, part_mask in zip(hidden.split(piece, 1), masks, strict=True):
        y, state = mixer.prefill(part, part_mask, state)
        outputs.append(y)
    return torch.cat(outputs, 1), state


def precise(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 where it was."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _tensors(state: Any) -> dict[str, Tensor]:
    values = {field.name: getattr(state, field.name) for field in fields(state)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}
