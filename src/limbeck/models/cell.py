"""A network of one repeated cell, in the manner of NAS-Bench-201: what architecture searches are compared on."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from limbeck.models.configs import CellNetConfig, Operation

EDGES = ("edge_10", "edge_20", "edge_21", "edge_30", "edge_31", "edge_32")
"""The arguments that make up a cell; each is "none", "skip", "conv1", "conv3" or "pool"."""


class CellNet(nn.Module):
    """Three stages of equal cells between residual blocks that halve the map, global average pooling, a linear head.

    A cell has four nodes: node 0 is its input, every other node the sum of an operation on each node before it, and
    node 3 its output. With 5 operations on 6 edges there are 15,625 such networks.

    Args:
        channels: channels of the images.
        classes: number of logits.
        width: channels of the first stage; each later stage doubles them.
        cells: cells a stage.
        edge_10: operation from node 0 to node 1: "none" (zeros), "skip" (identity), "conv1" and "conv3" (ReLU,
            convolution, batch norm), "pool" (3x3 average).
        edge_20: from node 0 to node 2.
        edge_21: from node 1 to node 2.
        edge_30: from node 0 to node 3.
        edge_31: from node 1 to node 3.
        edge_32: from node 2 to node 3.

    Attributes:
        config: all constructor arguments as plain data; `CellNet(**config)` rebuilds the network.

    Source: Dong and Yang, *NAS-Bench-201: Extending the Scope of Reproducible Neural Architecture Search*, ICLR 2020,
    arXiv 2001.00326.
    """

    def __init__(
        self,
        channels: int = 3,
        classes: int = 10,
        width: int = 16,
        cells: int = 5,
        edge_10: Operation = "conv3",
        edge_20: Operation = "skip",
        edge_21: Operation = "conv3",
        edge_30: Operation = "skip",
        edge_31: Operation = "skip",
        edge_32: Operation = "conv3",
    ) -> None:
        super().__init__()
        edges: tuple[Operation, ...] = (edge_10, edge_20, edge_21, edge_30, edge_31, edge_32)
        chosen: Any = dict(zip(EDGES, edges, strict=True))
        checked = CellNetConfig(channels=channels, classes=classes, width=width, cells=cells, **chosen)
        self.config: dict[str, Any] = checked.model_dump()
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        stages = []
        for stage in range(3):
            here = width * 2**stage
            first = [Reduction(here // 2, here)] if stage else []
            stages.append(nn.Sequential(*first, *(Cell(here, edges) for _ in range(cells))))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(4 * width)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (items, classes) of images (items, channels, height, width)."""
        features = self.norm(self.stages(self.stem(image)))
        return self.head(functional.relu(features).mean((2, 3)))

    def layers(self) -> list[str]:
        """Module paths of the stages, from input to output."""
        return [f"stages.{i}" for i in range(len(self.stages))]


class Cell(nn.Module):
    """Four nodes, each the sum of operations on those before it; the size of the map stays.

    Args:
        channels: channels of the map.
        edges: operations into node 1, then node 2, then node 3, each from node 0 on.
    """

    def __init__(self, channels: int, edges: tuple[Operation, ...]) -> None:
        super().__init__()
        made = iter([_operation(name, channels) for name in edges])
        self.nodes = nn.ModuleList(nn.ModuleList(next(made) for _ in range(node)) for node in (1, 2, 3))

    def forward(self, features: Tensor) -> Tensor:
        """The last node (items, channels, height, width)."""
        reached = [features]
        for node in self.nodes:
            assert isinstance(node, nn.ModuleList)
            reached.append(torch.stack([edge(one) for edge, one in zip(node, reached, strict=True)]).sum(0))
        return reached[-1]


class Reduction(nn.Module):
    """A residual block that halves the map and changes its channels; a map of one pixel stays as it is.

    Args:
        inputs: channels of the incoming map.
        outputs: channels of the outgoing map.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.second = _convolution(inputs, outputs, 3, stride=2), _convolution(outputs, outputs, 3)
        self.shortcut = nn.Sequential(
            nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False), nn.Conv2d(inputs, outputs, 1, bias=False)
        )

    def forward(self, features: Tensor) -> Tensor:
        """The map (items, outputs, height / 2, width / 2), rounded up."""
        return self.shortcut(features) + self.second(self.first(features))


class Zero(nn.Module):
    """Nothing: zeros of the input's shape, without a gradient."""

    def forward(self, features: Tensor) -> Tensor:
        """Zeros like `features`."""
        return torch.zeros_like(features)


def _operation(name: Operation, channels: int) -> nn.Module:
    if name == "none":
        return Zero()
    if name == "skip":
        return nn.Identity()
    if name == "pool":
        return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    return _convolution(channels, channels, 1 if name == "conv1" else 3)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    return nn.Sequential(nn.ReLU(), convolution, nn.BatchNorm2d(outputs))
