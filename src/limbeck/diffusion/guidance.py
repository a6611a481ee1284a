"""Guidance: combining what a denoiser says with and without a condition, in one batched call.

The scale is g: 1 is the conditional prediction alone. Papers that write w mean g = 1 + w. A guided prediction is linear
in the predictions, so it is the same for eps, x0, v and velocity.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.diffusion.denoiser import Condition, Denoiser
from limbeck.diffusion.predictions import Prediction

Scale = float | Float[Tensor, " items"]


def guided(denoiser: Denoiser, x_t: Tensor, t: Tensor, condition: Condition, scale: Scale) -> Prediction:
    """pred_u + g (pred_c - pred_u), from one call on a batch of twice the size (Ho and Salimans, 2022).

    Args:
        denoiser: has a null condition.
        x_t: noisy items (items, ...).
        t: times (items,).
        condition: of each item.
        scale: g, one number or one an item; where it is the number 1, or there is nothing to leave out, one call on the
            condition alone is made.
    """
    if not condition or (isinstance(scale, (int, float)) and scale == 1):
        return denoiser(x_t, t, condition)
    return combine(denoiser, x_t, t, [(scale, condition, denoiser.null(condition))])


def combine(
    denoiser: Denoiser,
    x_t: Tensor,
    t: Tensor,
    terms: Sequence[tuple[Scale, Condition, Condition]],
    base: Condition | None = None,
) -> Prediction:
    """base + sum over terms of scale (plus - minus), all from one batched call.

    Args:
        denoiser: what predicts.
        x_t: noisy items (items, ...).
        t: times (items,).
        terms: (scale, plus condition, minus condition) each.
        base: where the sum starts from; the first term's minus condition if absent, which is plain guidance.

    Raises:
        ValueError: the conditions do not all hold the same names.
    """
    asked = [terms[0][2] if base is None else base, *(side for _, *sides in terms for side in sides)]
    distinct = list({id(condition): condition for condition in asked}.values())
    if any(condition.keys() != distinct[0].keys() for condition in distinct):
        raise ValueError("conditions of one batched call must hold the same names: take null(condition) for none")
    place = {id(condition): n for n, condition in enumerate(distinct)}
    together = {name: torch.cat([condition[name] for condition in distinct]) for name in distinct[0]}
    count = len(distinct)
    batched = denoiser(torch.cat([x_t] * count), t.repeat(count), together)
    values = batched.value.chunk(count)
    result = values[place[id(asked[0])]]
    for scale, plus, minus in terms:
        result = result + _shaped(scale, x_t) * (values[place[id(plus)]] - values[place[id(minus)]])
    return Prediction(result, batched.kind, x_t, t, denoiser.schedule)


def g_from_w(w: Tensor | float) -> Tensor | float:
    """The scale g of papers whose w = 0 is the conditional prediction."""
    return 1 + w


def _shaped(scale: Scale, x: Tensor) -> Tensor | float:
    if isinstance(scale, Tensor):
        return scale.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return scale
