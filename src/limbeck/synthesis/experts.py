"""Experts: networks trained on real data, of which the way that their weights took is kept."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from limbeck.synthesis.sharpness import GSAM

Weights = dict[str, Tensor]
"""A network's parameters by name."""


class Trajectories(nn.Module):
    """The ways of several experts of one architecture; as a module it is one of these networks, fully trained.

    Args:
        network: a network of the architecture.
        count: number of experts, at least 1.
        epochs: epochs that each was trained, at least 1.

    Attributes:
        network: the first expert after its last epoch, once the trajectories are filled in.
        snapshots: (experts, epochs + 1, numbers) float32, all parameters in a row, before the first epoch and after
            each. They stay in the host's memory wherever the module is moved: a step needs two rows of them.
    """

    snapshots: Tensor

    def __init__(self, network: nn.Module, count: int, epochs: int) -> None:
        super().__init__()
        self.network = network
        numbers = sum(parameter.numel() for parameter in network.parameters())
        self.register_buffer("snapshots", torch.zeros(count, epochs + 1, numbers))

    @property
    def count(self) -> int:
        """Number of experts."""
        return len(self.snapshots)

    @property
    def epochs(self) -> int:
        """Epochs that each was trained."""
        return self.snapshots.shape[1] - 1

    def at(self, expert: int, epoch: int, like: Tensor | None = None) -> Weights:
        """One expert's weights after an epoch (0: before the first), by parameter name; copies.

        Args:
            expert: its number, from 0.
            epoch: from 0 to `epochs`.
            like: gives device and precision; the module's own if absent.
        """
        row = self.snapshots[expert, epoch].clone()
        return unflatten(row if like is None else row.to(like), dict(self.network.named_parameters()))

    def fill(self, expert: int, way: Mapping[str, Float[Tensor, "snapshots *_"]]) -> None:
        """Takes in one expert's snapshots, stacked for each parameter by name."""
        rows = [way[name].flatten(1).to(self.snapshots) for name, _ in self.network.named_parameters()]
        self.snapshots[expert].copy_(torch.cat(rows, 1))

    def forward(self, image: Tensor) -> Tensor:
        """What the network makes of images: logits (items, classes)."""
        return self.network(image)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Trajectories":
        kept = self._buffers.pop("snapshots")
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers["snapshots"] = kept
        return self


def unflatten(row: Float[Tensor, " numbers"], like: Mapping[str, Tensor]) -> Weights:
    """A vector cut up into tensors of the names and shapes of `like`, in their order; views."""
    parts = row.split([tensor.numel() for tensor in like.values()])
    return {name: part.view(like[name].shape) for name, part in zip(like, parts, strict=True)}


def flatten(weights: Mapping[str, Tensor]) -> Float[Tensor, " numbers"]:
    """Tensors in a row, in their order; `unflatten` takes it apart again."""
    return torch.cat([tensor.flatten() for tensor in weights.values()])


def train_expert(
    network: nn.Module,
    batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
    epochs: int,
    lr: float,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    rho: float = 0.0,
    alpha: float = 0.4,
    adaptive: bool = True,
) -> Iterator[Weights]:
    """Trains a network with SGD and yields its weights before the first epoch and after each.

    With `rho` above 0 every step is one of GSAM, and the way a flat one: errors of a network that follows it at some
    distance do not build up. Source: Cazenavette et al., 2022 (plain); Du et al., "Minimizing the Accumulated
    Trajectory Error to Improve Dataset Distillation", 2023 (flat).

    Args:
        network: trained in place, in train mode.
        batches: images and labels (items,) int64 of the batches of an epoch, counted from 0.
        epochs: how many.
        lr: constant learning rate.
        momentum: of SGD; the papers' experts have none.
        weight_decay: of SGD.
        rho: see `limbeck.synthesis.sharpness.ascent`.
        alpha: see `limbeck.synthesis.sharpness.gsam_gradient`.
        adaptive: see `limbeck.synthesis.sharpness.ascent`.

    Yields:
        Copies of all parameters by name.
    """
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    descent = GSAM(network, optimizer, rho, alpha, adaptive)
    network.train()
    yield _copied(network)
    for epoch in range(epochs):
        for images, labels in batches(epoch):
            descent.step(lambda x=images, y=labels: functional.cross_entropy(network(x).float(), y))  # type: ignore[misc]
        yield _copied(network)


def _copied(network: nn.Module) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
