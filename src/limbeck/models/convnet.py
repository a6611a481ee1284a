"""A plain convolutional classifier: the small network that most feature-distillation papers assume."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from limbeck.models.configs import ConvNetConfig, Norm


class ConvNet(nn.Module):
    """Stages of 3x3 convolutions, global average pooling and a linear head.

    Stage i has `width * 2**i` channels; each stage after the first halves the resolution (rounding up, so that no
    image is too small). `stages.i` outputs the map after the last ReLU and `stages.i.norm` the map before it.

    Args:
        channels: channels of the images.
        classes: number of logits.
        width: channels of the first stage.
        depth: number of stages.
        blocks: convolutions a stage.
        norm: "batch", "group" (groups of up to 8 channels) or "none".

    Attributes:
        config: all constructor arguments as plain data; `ConvNet(**config)` rebuilds the network.
    """

    def __init__(
        self,
        channels: int = 1,
        classes: int = 10,
        width: int = 16,
        depth: int = 3,
        blocks: int = 1,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        checked = ConvNetConfig(channels=channels, classes=classes, width=width, depth=depth, blocks=blocks, norm=norm)
        self.config: dict[str, Any] = checked.model_dump()
        widths = [channels, *(width * 2**stage for stage in range(depth))]
        self.stages = nn.Sequential(
            *(ConvStage(widths[i], widths[i + 1], 1 if i == 0 else 2, blocks, norm) for i in range(depth))
        )
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (items, classes) of images (items, channels, height, width)."""
        return self.head(self.stages(image).mean((2, 3)))

    def layers(self) -> list[str]:
        """Module paths of the stages, from input to output."""
        return [f"stages.{i}" for i in range(len(self.stages))]


class ConvStage(nn.Module):
    """`blocks` times convolution, normalisation and ReLU; the first convolution carries the stride.

    Args:
        inputs: channels of the incoming map.
        outputs: channels of the outgoing map.
        stride: stride of the first convolution.
        blocks: number of convolutions, at least 1.
        norm: see `ConvNet`.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, blocks: int, norm: Norm) -> None:
        super().__init__()
        shapes = [(inputs, stride)] + [(outputs, 1)] * (blocks - 1)
        convolutions = [_convolution(channels, outputs, step, norm) for channels, step in shapes]
        self.body = nn.Sequential(
            *(nn.Sequential(convolution, _normalisation(outputs, norm), nn.ReLU()) for convolution in convolutions[:-1])
        )
        self.conv = convolutions[-1]
        self.norm = _normalisation(outputs, norm)

    def forward(self, features: Tensor) -> Tensor:
        """The map (items, outputs, height / stride, width / stride) after the last ReLU."""
        # Not in place: `norm`'s output is tapped by methods that compare maps before the activation.
        return functional.relu(self.norm(self.conv(self.body(features))))


def _convolution(inputs: int, outputs: int, stride: int, norm: Norm) -> nn.Conv2d:
    convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=norm == "none")
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    if convolution.bias is not None:
        with torch.no_grad():
            convolution.bias.zero_()
    return convolution


def _normalisation(channels: int, norm: Norm) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        return nn.GroupNorm(channels // math.gcd(channels, 8), channels)
    return nn.Identity()
