"""Experts from plain arguments, as recipes name them and folders keep them."""

from typing import Any

from torch import nn

from limbeck.models.configs import BlockNorm, ExpertNetwork, ExpertsConfig
from limbeck.models.mlp import MLP
from limbeck.synthesis.experts import Trajectories
from limbeck.synthesis.network import PooledConvNet


class Experts(Trajectories):
    """Trajectories of experts of a small network; see `ExpertsConfig`. The method `experts` fills them in.

    Attributes:
        config: all constructor arguments as plain data; `Experts(**config)` rebuilds the module's shape.
    """

    def __init__(
        self,
        network: ExpertNetwork = "pooled-convnet",
        channels: int = 3,
        height: int = 32,
        side: int = 32,
        classes: int = 10,
        width: int = 128,
        depth: int = 3,
        norm: BlockNorm = "instance",
        experts: int = 100,
        epochs: int = 50,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        made = ExpertsConfig(**arguments)
        super().__init__(_network(made), made.experts, made.epochs)
        self.config: dict[str, Any] = made.model_dump(mode="json")


def _network(made: ExpertsConfig) -> nn.Module:
    if made.network == "mlp":
        return MLP(made.channels * made.height * made.side, made.classes, made.width, made.depth)
    return PooledConvNet(made.channels, made.height, made.side, made.classes, made.width, made.depth, made.norm)
