"""How well networks learn from a synthetic set: fresh ones are trained on it, always in the same way, and measured."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from limbeck.core.errors import IncompatibleError
from limbeck.core.randomness import derive, generator
from limbeck.metrics.intervals import t_interval
from limbeck.models.convnet import ConvNet
from limbeck.models.mlp import MLP
from limbeck.models.modes import device_of
from limbeck.models.seeding import seeded
from limbeck.synthesis.augmentation import SiameseAugment
from limbeck.synthesis.network import PooledConvNet
from limbeck.synthesis.synthetic_set import SyntheticSet, first_images

if TYPE_CHECKING:
    from limbeck.data.source import Source

Figures = dict[str, Any]
Pause = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Protocol:
    """How a network is trained on a set: SGD whose rate drops to a tenth at half time.

    The papers train for 1,000 epochs at a rate of 0.01; steps are counted here, so that sets of all sizes cost the
    same, at a rate at which they suffice: all of the digits then teach 99 %, and 83 % at the papers' rate.

    Attributes:
        steps: of SGD.
        batch_size: items a step, all of a set that is smaller.
        lr: rate of SGD; a set with a step size of its own brings its own.
        momentum: of SGD.
        weight_decay: of SGD.
        networks: how many fresh networks, each from another seed.
    """

    steps: int = 300
    batch_size: int = 256
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    networks: int = 3


PROTOCOL = Protocol()
"""What runs measure by."""

Build = Callable[[tuple[int, int, int], int], nn.Module]
NETWORKS: dict[str, Build] = {
    "pooled-convnet": lambda shape, classes: PooledConvNet(*shape, classes, width=32),
    "convnet": lambda shape, classes: ConvNet(shape[0], classes),
    "mlp": lambda shape, classes: MLP(shape[0] * shape[1] * shape[2], classes, width=128),
}
"""The networks, from (channels, height, width) and classes; the first one measures, the others are for comparison."""


def evaluate_synthetic(
    model: nn.Module,
    source: "Source",
    *,
    teacher: Any = None,
    batch_size: int = 256,
    pause: Pause | None = None,
    protocol: Protocol | None = None,
) -> Figures:
    """Trains networks on a synthetic set and measures them on a source.

    Args:
        model: the set.
        source: real items with labels, none of which was distilled.
        teacher: plays no part.
        batch_size: items at a time when measuring.
        pause: called between networks; raises `Interrupted` when the run was asked to stop.
        protocol: how networks are trained; `PROTOCOL` if absent.

    Returns:
        `items` of the source; `accuracy`, the mean over the networks, with its 95 % interval over their seeds
        `accuracy_low` to `accuracy_high`; `accuracy_plain`, without augmentation, of a set that names some;
        `accuracy_hard`, with the most probable class as label, of a set with soft labels; `images` and `bytes` of the
        set; `step_size` of a set that has one. Shares are in [0, 1].

    Raises:
        IncompatibleError: the model is no synthetic set.
    """
    if not isinstance(model, SyntheticSet):
        raise IncompatibleError(f"a {type(model).__name__} is no synthetic set")
    trial = Trial(source, protocol or PROTOCOL, batch_size, pause)
    lr = None if model.lr is None else float(model.lr.detach())
    images, labels = (part.detach() for part in model())
    found = trial.accuracies(images, labels, model.augmentation, lr=lr)
    centre, half = t_interval(found)
    figures: Figures = {"items": len(source), "accuracy": centre}
    figures |= {"accuracy_low": max(centre - half, 0.0), "accuracy_high": min(centre + half, 1.0)}
    if model.augmentation:
        figures["accuracy_plain"] = _mean(trial.accuracies(images, labels, (), lr=lr))
    if model.soft:
        figures["accuracy_hard"] = _mean(trial.accuracies(images, model.hard_labels, model.augmentation, lr=lr))
    figures |= {"images": len(model), "bytes": model.budget()}
    return figures | ({} if lr is None else {"step_size": lr})


def compare_synthetic(
    model: nn.Module,
    source: "Source",
    train: "Source | None",
    *,
    pause: Pause | None = None,
    protocol: Protocol | None = None,
) -> Figures:
    """What a set is to be held against, each the mean accuracy of fresh networks, trained alike.

    Args:
        model: the set.
        source: what to measure on.
        train: what was distilled; None leaves out what is trained on real items.
        pause: see `evaluate_synthetic`.
        protocol: likewise.

    Returns:
        `by_network`, the set's accuracy with each of `NETWORKS`; with `train` also `random`, of as many real items a
        class, drawn anew for each network, and `full`, of all real items. The two use the set's augmentation.
    """
    if not isinstance(model, SyntheticSet):
        raise IncompatibleError(f"a {type(model).__name__} is no synthetic set")
    trial = Trial(source, protocol or PROTOCOL, pause=pause)
    lr = None if model.lr is None else float(model.lr.detach())
    images, labels = (part.detach() for part in model())
    figures: Figures = {
        "by_network": {
            name: _mean(trial.accuracies(images, labels, model.augmentation, lr=lr, network=name)) for name in NETWORKS
        }
    }
    if train is None:
        return figures
    figures["random"] = _mean(trial.of_random(train, len(model) // source.classes or 1, model.augmentation))
    rows = (train.labels >= 0).nonzero().flatten()
    real = train.fetch(rows)
    figures["full"] = _mean(trial.accuracies(real["image"], real["label"], model.augmentation))
    return figures


class Trial:
    """Trains networks on one thing or another, all by one protocol, and measures them on one source.

    Args:
        source: what to measure on; its unlabelled items do not count.
        protocol: how networks are trained.
        batch_size: items at a time when measuring.
        pause: called between networks.
    """

    def __init__(
        self, source: "Source", protocol: Protocol = PROTOCOL, batch_size: int = 256, pause: Pause | None = None
    ) -> None:
        self.source, self.protocol, self.batch_size, self.pause = source, protocol, batch_size, pause

    def accuracies(
        self,
        images: Tensor,
        labels: Tensor,
        augmentation: tuple[str, ...] = (),
        *,
        lr: float | None = None,
        network: str = "pooled-convnet",
    ) -> list[float]:
        """The accuracy of each network that was trained on images (items, channels, height, width) with labels.

        Args:
            images: normalised as the source is.
            labels: classes (items,) or probabilities (items, classes).
            augmentation: names of `limbeck.synthesis.augmentation.CHANGES`.
            lr: rate in place of the protocol's.
            network: a key of `NETWORKS`.
        """
        augment = SiameseAugment(augmentation)
        return [
            self._one(images, labels, augment, lr or self.protocol.lr, network, seed)
            for seed in range(self.protocol.networks)
        ]

    def of_random(self, train: "Source", per_class: int, augmentation: tuple[str, ...] = ()) -> list[float]:
        """The accuracy of each network that was trained on real items drawn for it, `per_class` of each class."""
        labels, augment = torch.arange(train.classes).repeat_interleave(per_class), SiameseAugment(augmentation)
        return [
            self._one(
                first_images(train, per_class, "real", seed), labels, augment, self.protocol.lr, "pooled-convnet", seed
            )
            for seed in range(self.protocol.networks)
        ]

    def _one(self, images: Tensor, labels: Tensor, augment: SiameseAugment, lr: float, kind: str, seed: int) -> float:
        if self.pause is not None:
            self.pause()
        channels, height, width = images.shape[1:]
        with seeded(seed, "trial", kind):
            network = NETWORKS[kind]((channels, height, width), self.source.classes).to(images.device)
        self._train(network, images.float(), labels.to(images.device), augment, lr, seed)
        return self._accuracy(network.eval())

    def _train(
        self, network: nn.Module, images: Tensor, labels: Tensor, augment: SiameseAugment, lr: float, seed: int
    ) -> None:
        asked = self.protocol
        optimizer = torch.optim.SGD(network.parameters(), lr, asked.momentum, weight_decay=asked.weight_decay)
        with torch.enable_grad():
            for step, rows in zip(range(asked.steps), self._rows(len(images), seed), strict=False):
                optimizer.param_groups[0]["lr"] = lr if 2 * step < asked.steps else lr / 10
                seen = augment(images[rows], derive(seed, "trial", step), each=True)
                optimizer.zero_grad()
                functional.cross_entropy(network(seen), labels[rows]).backward()
                optimizer.step()

    def _rows(self, items: int, seed: int) -> Iterator[Tensor]:
        """Batches without end: shuffle after shuffle, each cut into whole batches."""
        draws, size = generator(seed, "trial", "order"), min(self.protocol.batch_size, items)
        while True:
            order = torch.randperm(items, generator=draws)
            yield from order[: items // size * size].split(size)

    @torch.no_grad()
    def _accuracy(self, network: nn.Module) -> float:
        correct = labelled = 0
        device = device_of(network)
        for rows in torch.arange(len(self.source)).split(self.batch_size):
            batch = self.source.fetch(rows).to(device)
            known = batch["label"] >= 0
            correct += int((network(batch["image"]).argmax(1) == batch["label"])[known].sum())
            labelled += int(known.sum())
        return correct / max(labelled, 1)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
