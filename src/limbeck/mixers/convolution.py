"""A short causal convolution over tokens, each channel by itself, that looks past padding."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional


def causal_convolution(
    x: Float[Tensor, "batch length channels"],
    weight: Float[Tensor, "channels taps"],
    bias: Float[Tensor, " channels"] | None = None,
    window: Float[Tensor, "batch before channels"] | None = None,
    mask: Bool[Tensor, "batch length"] | None = None,
) -> tuple[Float[Tensor, "batch length channels"], Float[Tensor, "batch before channels"]]:
    """y_t = bias + sum_k weight[taps - 1 - k] x_{t-k} over tokens alone, and the last taps - 1 inputs.

    Args:
        x: inputs; what stands at padding is not looked at.
        weight: the last tap is that of the token itself.
        bias: added to every output.
        window: the taps - 1 inputs before the first; zeros if absent.
        mask: true at tokens. A token's predecessors are tokens, whatever padding lies between.

    Returns:
        Outputs, 0 at padding, and the window for what comes next. 2 x taps FLOPs an entry.
    """
    before = weight.shape[1] - 1
    if window is None:
        window = x.new_zeros(len(x), before, x.shape[2])
    order = None
    if mask is not None:
        order = torch.argsort(~mask, dim=1, stable=True)[..., None]  # tokens first, in their order
        x = (x * mask[..., None]).take_along_dim(order, 1)
    joined = torch.cat([window.to(x.dtype), x], 1)
    if joined.shape[1] == weight.shape[1]:  # a single token, for which starting a convolution costs more than the sum
        y = (joined * weight.t()).sum(1, keepdim=True)
        y = y if bias is None else y + bias
    else:
        y = functional.conv1d(joined.transpose(1, 2), weight[:, None], bias, groups=len(weight)).transpose(1, 2)
    if mask is None or order is None:
        return y, joined[:, joined.shape[1] - before :]
    last = mask.sum(1)[:, None, None] + torch.arange(before, device=x.device)[None, :, None]
    back = torch.argsort(order, dim=1)
    return y.take_along_dim(back, 1) * mask[..., None], joined.take_along_dim(last, 1)
