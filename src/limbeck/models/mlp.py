"""A multi-layer perceptron on flattened inputs: the smallest student there is."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from limbeck.models.configs import MLPConfig


class MLP(nn.Module):
    """Hidden layers with ReLU and a linear head.

    Args:
        inputs: numbers an item, after flattening.
        classes: number of logits.
        width: units of each hidden layer.
        depth: hidden layers; 0 is a linear classifier.

    Attributes:
        config: all constructor arguments as plain data; `MLP(**config)` rebuilds the network.
    """

    def __init__(self, inputs: int = 64, classes: int = 10, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.config: dict[str, Any] = MLPConfig(inputs=inputs, classes=classes, width=width, depth=depth).model_dump()
        sizes = [inputs, *[width] * depth]
        self.stages = nn.ModuleList(HiddenLayer(sizes[i], sizes[i + 1]) for i in range(depth))
        self.head = nn.Linear(sizes[-1], classes)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (items, classes) of items of any shape that hold `inputs` numbers each."""
        hidden = image.flatten(1)
        for stage in self.stages:
            hidden = stage(hidden)
        return self.head(hidden)

    def layers(self) -> list[str]:
        """Module paths of the hidden layers, from input to output."""
        return [f"stages.{i}" for i in range(len(self.stages))]


class HiddenLayer(nn.Module):
    """A linear map and ReLU; `norm` (no operation) gives the values before the ReLU, as in `ConvNet`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        nn.init.kaiming_normal_(self.linear.weight, nonlinearity="relu")
        nn.init.zeros_(self.linear.bias)
        self.norm = nn.Identity()

    def forward(self, hidden: Tensor) -> Tensor:
        """Activations (items, outputs)."""
        return functional.relu(self.norm(self.linear(hidden)))
