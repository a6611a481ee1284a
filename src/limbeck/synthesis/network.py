"""The network of the data-set distillation papers: convolutions, instance norm and average pooling."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

BlockNorm = Literal["instance", "batch", "none"]


class PooledConvNet(nn.Module):
    """ConvNet-D: D times convolution, norm, ReLU and 2x2 average pooling, then one linear layer on all that is left.

    Sides are rounded up when they are halved, so that no image is too small. The network of dataset condensation
    (Zhao et al., 2021) and its successors, who use width 128 and depth 3 for images of 32 pixels.

    Args:
        channels: channels of the images.
        height: of the images, pixels.
        side: width of the images, pixels.
        classes: number of logits.
        width: channels of every block.
        depth: number of blocks.
        norm: "instance" (a group norm with one group a channel, with scale and shift), "batch" or "none".
    """

    def __init__(
        self,
        channels: int,
        height: int,
        side: int,
        classes: int,
        width: int = 128,
        depth: int = 3,
        norm: BlockNorm = "instance",
    ) -> None:
        super().__init__()
        inputs = [channels, *[width] * (depth - 1)]
        self.convolutions = nn.ModuleList(nn.Conv2d(count, width, 3, padding=1) for count in inputs)
        self.norms = nn.ModuleList(_norm(width, norm) for _ in inputs)
        for _ in inputs:
            height, side = -(-height // 2), -(-side // 2)
        self.head = nn.Linear(width * height * side, classes)

    def maps(
        self, image: Float[Tensor, "items channels height width"]
    ) -> tuple[list[Float[Tensor, "items maps _ _"]], Float[Tensor, "items dims"]]:
        """Every block's map after its ReLU and before its pooling, and the flattened last one after it."""
        found, features = [], image
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            found.append(functional.relu(norm(convolution(features))))
            features = functional.avg_pool2d(found[-1], 2, ceil_mode=True)
        return found, features.flatten(1)

    def embed(self, image: Float[Tensor, "items channels height width"]) -> Float[Tensor, "items dims"]:
        """What the head sees."""
        return self.maps(image)[1]

    def forward(self, image: Float[Tensor, "items channels height width"]) -> Float[Tensor, "items classes"]:
        """Logits."""
        return self.head(self.embed(image))


@torch.no_grad()
def redraw(network: nn.Module, draws: torch.Generator) -> nn.Module:
    """Draws a network's weights anew, as torch begins linear layers and convolutions; norms start as the identity.

    Unlike the constructor it draws from a generator, so that several processes can agree on a network.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bound = 1 / math.sqrt(module.weight[0].numel())
            for weight in module.parameters(recurse=False):
                weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=draws))
        elif isinstance(module, nn.GroupNorm | nn.BatchNorm2d):
            module.reset_parameters()
    return network


def _norm(width: int, norm: BlockNorm) -> nn.Module:
    if norm == "instance":
        return nn.GroupNorm(width, width)
    return nn.BatchNorm2d(width) if norm == "batch" else nn.Identity()
