"""Weights that carry over between networks of one architecture without training."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from limbeck.core.errors import IncompatibleError

State = Mapping[str, Tensor]


@torch.no_grad()
def merged_delta(rectified: State, custom: State, origin: State, alpha: float = 1.0) -> dict[str, Tensor]:
    """W_rectified + alpha (W_custom - W_origin): a fine-tune of the original network, moved onto its rectified flow.

    Sums are taken in float32 at least and come back in the rectified network's precision; whole numbers are its own.

    Args:
        rectified: weights of the network to be changed; none of them is, a new set is returned.
        custom: of the fine-tune.
        origin: of what the fine-tune started from.
        alpha: how much of the difference; 0 changes nothing.

    Raises:
        IncompatibleError: the three do not hold the same weights.

    Source: Liu et al., *InstaFlow*, 2023, arXiv 2309.06380.
    """
    for name, other in (("fine-tune", custom), ("original", origin)):
        for key in rectified.keys() | other.keys():
            if key not in rectified or key not in other or rectified[key].shape != other[key].shape:
                raise IncompatibleError(
                    f"the {name} and the rectified network differ at '{key}'", "take networks of one architecture"
                )
    merged = {}
    for key, value in rectified.items():
        if not value.is_floating_point() or alpha == 0:
            merged[key] = value.clone()
            continue
        precise = torch.promote_types(value.dtype, torch.float32)
        delta = custom[key].to(value.device, precise) - origin[key].to(value.device, precise)
        merged[key] = (value.to(precise) + alpha * delta).to(value.dtype)
    return merged


@torch.no_grad()
def negate_output(network: nn.Module, layer: str = "conv_out") -> nn.Module:
    """Turns the sign of a network's output by that of its last layer, in place; returns the network.

    Networks published as rectified flows say v = data - noise; diffusers' FlowMatchEuler and this library's `velocity`
    mean -v, at t = 1 - tau. A UNet2DConditionModel of InstaFlow, which is told 1000 (1 - tau), needs no more than this.

    Args:
        network: ends in a linear layer or convolution.
        layer: module path of that layer.
    """
    for weight in network.get_submodule(layer).parameters():
        weight.neg_()
    return network
