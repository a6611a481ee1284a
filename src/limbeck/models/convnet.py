"""A plain convolutional classifier: the small network that most feature-distillation papers assume."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from limbeck.models.configs import ConvNetConfig, Norm


class ConvNet(nn.Module):
    """Stages of convolutions, global average pooling and a linear head.

    Stage i has `width * 2**i` channels; each stage after the first halves the resolution (rounding up, so that no
    image is too small). `stages.i` outputs the map after the last ReLU and `stages.i.norm` the map before it and
    before the skip connection.

    Args:
        channels: channels of the images.
        classes: number of logits.
        width: channels of the first stage.
        depth: number of stages.
        blocks: convolutions a stage.
        norm: "batch", "group" (groups of up to 8 channels) or "none".
        kernel: side of the convolutions' kernels, odd; the first one, which sees the image, is always 3x3.
        skip: add each convolution's input to its output, before the ReLU; projected by a 1x1 convolution where the
            two differ in shape.
        neck: channels of a 1x1 convolution behind the stages, so that networks of different width hand equally many
            channels to the head; 0 for none.

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
        kernel: int = 3,
        skip: bool = False,
        neck: int = 0,
    ) -> None:
        super().__init__()
        given = {"channels": channels, "classes": classes, "width": width, "depth": depth, "blocks": blocks}
        checked = ConvNetConfig(**given, norm=norm, kernel=kernel, skip=skip, neck=neck)
        self.config: dict[str, Any] = checked.model_dump()
        widths = [channels, *(width * 2**stage for stage in range(depth))]
        strides, firsts = [1, *[2] * (depth - 1)], [3, *[kernel] * (depth - 1)]
        stages = [
            ConvStage(widths[i], widths[i + 1], strides[i], blocks, norm, (firsts[i], kernel), skip)
            for i in range(depth)
        ]
        if neck:
            stages.append(ConvStage(widths[-1], neck, 1, 1, norm, (1, 1)))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(neck or widths[-1], classes)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (items, classes) of images (items, channels, height, width)."""
        return self.head(self.stages(image).mean((2, 3)))

    def layers(self) -> list[str]:
        """Module paths of the stages, from input to output; the neck is one of them."""
        return [f"stages.{i}" for i in range(len(self.stages))]


class ConvStage(nn.Module):
    """`blocks` times convolution, normalisation and ReLU; the first convolution carries the stride.

    Args:
        inputs: channels of the incoming map.
        outputs: channels of the outgoing map.
        stride: stride of the first convolution.
        blocks: number of convolutions, at least 1.
        norm: see `ConvNet`.
        kernels: side of the first convolution's kernel, and of all others.
        skip: see `ConvNet`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        blocks: int,
        norm: Norm,
        kernels: tuple[int, int] = (3, 3),
        skip: bool = False,
    ) -> None:
        super().__init__()
        shapes = [(inputs, stride)] + [(outputs, 1)] * (blocks - 1)
        sides = [kernels[0]] + [kernels[1]] * (blocks - 1)
        convolutions = [
            _convolution(channels, outputs, step, norm, side)
            for (channels, step), side in zip(shapes, sides, strict=True)
        ]
        self.body = nn.Sequential(
            *(nn.Sequential(convolution, _normalisation(outputs, norm), nn.ReLU()) for convolution in convolutions[:-1])
        )
        self.conv = convolutions[-1]
        self.norm = _normalisation(outputs, norm)
        shortcuts = [_shortcut(channels, outputs, step, norm) for channels, step in shapes] if skip else []
        self.shortcuts = nn.ModuleList(shortcuts)

    def forward(self, features: Tensor) -> Tensor:
        """The map (items, outputs, height / stride, width / stride) after the last ReLU."""
        # Not in place: `norm`'s output is tapped by methods that compare maps before the activation.
        if not self.shortcuts:
            return functional.relu(self.norm(self.conv(self.body(features))))
        for block, shortcut in zip(self.body, self.shortcuts, strict=False):
            assert isinstance(block, nn.Sequential)
            features = block[2](block[1](block[0](features)) + shortcut(features))
        return functional.relu(self.norm(self.conv(features)) + self.shortcuts[-1](features))


def _convolution(inputs: int, outputs: int, stride: int, norm: Norm, kernel: int) -> nn.Conv2d:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=norm == "none")
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    if convolution.bias is not None:
        with torch.no_grad():
            convolution.bias.zero_()
    return convolution


def _shortcut(inputs: int, outputs: int, stride: int, norm: Norm) -> nn.Module:
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return nn.Sequential(_convolution(inputs, outputs, stride, norm, 1), _normalisation(outputs, norm))


def _normalisation(channels: int, norm: Norm) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        return nn.GroupNorm(channels // math.gcd(channels, 8), channels)
    return nn.Identity()
