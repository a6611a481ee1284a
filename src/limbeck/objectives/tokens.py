"""Which tokens count, and the one way to average over them."""

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

IGNORED_LABEL = -100


def label_mask(labels: Int[Tensor, "*items"]) -> Bool[Tensor, "*items"]:
    """True where a label is a target, False where it is -100 (prompt, padding)."""
    return labels != IGNORED_LABEL


def next_token_shift(
    logits: Float[Tensor, "*batch length features"], labels: Int[Tensor, "*batch length"]
) -> tuple[Float[Tensor, "*batch shorter features"], Int[Tensor, "*batch shorter"]]:
    """Pair the output at position i with the label at i + 1: the causal shift, which no objective does by itself.

    ``logits`` may as well be hidden states. Both results have length - 1 positions and are views.
    """
    return logits[..., :-1, :], labels[..., 1:]


def select_tokens(mask: Bool[Tensor, "*items"], *tensors: Shaped[Tensor, "..."]) -> tuple[Shaped[Tensor, "..."], ...]:
    """Drop the masked-out tokens of every tensor before anything is computed on them.

    ``mask`` is True where a token counts. A tensor of shape ``(*items, *rest)`` becomes ``(kept, *rest)``.
    Raises ValueError where a tensor does not begin with the mask's shape.
    """
    for tensor in tensors:
        if tensor.shape[: mask.ndim] != mask.shape:
            raise ValueError(f"a tensor {tuple(tensor.shape)} does not begin with the mask's shape {tuple(mask.shape)}")
    return tuple(tensor[mask] for tensor in tensors)


def reduce_tokens(values: Float[Tensor, "*items"], num_items: int | float | Tensor | None = None) -> Float[Tensor, ""]:
    """Sum of per-token values over the number of tokens: each token weighs the same, whatever its sequence's length.

    ``num_items`` is the count over all micro-batches and ranks where there are several; by default the number of
    ``values``. No tokens give 0, not NaN.
    """
    count = torch.as_tensor(values.numel() if num_items is None else num_items, device=values.device)
    return values.sum() / count.clamp_min(1)
