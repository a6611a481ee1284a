"""A synthetic set: a few trainable images with labels that stand for a whole data set."""

import copy
import math
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from limbeck.synthesis.selection import SELECTIONS
from limbeck.synthesis.whitening import ZCA

Start = Literal["real", "noise", "kmeans", "herding", "k-centre"]
"""How the images of a set begin: drawn or chosen among the real ones of each class, or as standard normal noise."""


@runtime_checkable
class Labelled(Protocol):
    """What a set can be started from: `limbeck.data.source.Source`, say."""

    labels: Tensor
    classes: int

    def fetch(self, indices: Tensor) -> Any:
        """The items at `indices` (items,) as something that gives `["image"]` (items, channels, height, width)."""


class SyntheticSet(nn.Module):
    """Trainable images with labels, and optionally the step size that networks are to be trained on them with.

    Images lie in the source's normalised units: mean 0 and deviation 1 a channel unless the recipe says otherwise.

    Args:
        images: (items, channels, height, width); copied.
        labels: the class of each image (items,) int64, or its probabilities (items, classes), each row of sum 1.
        lr: step size to start from, above 0; None leaves it out.
        augmentation: names of `limbeck.synthesis.augmentation.CHANGES` that networks are trained on the images with.

    Attributes:
        images: the parameter that is distilled.
        labels: a buffer.
        log_lr: natural logarithm of the step size (), a parameter; None where there is none.
        whitening: how the images were whitened, to undo it for pictures; None where they were not.

    Raises:
        ValueError: shapes that do not fit.
    """

    images: nn.Parameter
    labels: Tensor
    log_lr: nn.Parameter | None
    whitening: ZCA | None

    def __init__(
        self, images: Tensor, labels: Tensor, lr: float | None = None, augmentation: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        if images.ndim != 4 or labels.ndim not in (1, 2) or len(labels) != len(images):
            raise ValueError(f"images {tuple(images.shape)} and labels {tuple(labels.shape)} make no set")
        self.images = nn.Parameter(images.detach().clone().float())
        self.register_buffer("labels", labels.detach().clone())
        rate = None if lr is None else nn.Parameter(torch.tensor(math.log(lr)))
        self.register_parameter("log_lr", rate)
        self.augmentation = tuple(augmentation)
        self.register_module("whitening", None)

    @classmethod
    def initialise(
        cls, source: Labelled, per_class: int, how: Start = "real", *, seed: int = 0, lr: float | None = None
    ) -> "SyntheticSet":
        """A set of `per_class` images a class, class after class, with hard labels; see `first_images`."""
        labels = torch.arange(source.classes).repeat_interleave(per_class)
        return SyntheticSet(first_images(source, per_class, how, seed), labels, lr)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def soft(self) -> bool:
        """Whether labels are probabilities."""
        return self.labels.ndim == 2

    @property
    def lr(self) -> Tensor | None:
        """The step size (), with its gradient; None where there is none."""
        return None if self.log_lr is None else self.log_lr.exp()

    @property
    def hard_labels(self) -> Int64[Tensor, " items"]:
        """The class of each image; of soft labels the most probable one."""
        return self.labels.argmax(1) if self.soft else self.labels

    def of_class(self, label: int) -> Float[Tensor, "chosen channels height width"]:
        """The images of one class, with their gradient."""
        return self.images[self.hard_labels == label]

    def batch(
        self, rows: Shaped[Tensor, " rows"] | slice = slice(None)
    ) -> tuple[Float[Tensor, "chosen channels height width"], Tensor]:
        """Images, with their gradient, and labels at `rows`: item numbers, a mask or a slice."""
        return self.images[rows], self.labels[rows]

    def set_labels(self, labels: Tensor) -> None:
        """Exchanges the labels: classes (items,) int64, or probabilities (items, classes).

        Raises:
            ValueError: not one label an image.
        """
        if labels.ndim not in (1, 2) or len(labels) != len(self):
            raise ValueError(f"{len(self)} images, but labels of shape {tuple(labels.shape)}")
        self.labels = labels.detach().clone().to(self.images.device)

    def note_whitening(self, whitening: ZCA) -> None:
        """Keeps a copy of how the images are whitened; it is saved with the set."""
        self.whitening = copy.deepcopy(whitening).to(self.images.device)

    def budget(self) -> int:
        """Bytes of images, labels and step size at the precision that they have: all that networks are trained on.

        Whitening, which is a property of the real data, does not count.
        """
        tensors = [self.images, self.labels, *([self.log_lr] if self.log_lr is not None else [])]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def forward(self) -> tuple[Tensor, Tensor]:
        """All images and labels."""
        return self.batch()


@torch.no_grad()
def first_images(
    source: Labelled, per_class: int, how: Start = "real", seed: int = 0
) -> Float[Tensor, "items channels height width"]:
    """The images that a set starts from, `per_class` of each class, class after class.

    A class with fewer real images than are wanted gives some of them again.

    Args:
        source: images with labels; items without a label (below 0) are left out.
        per_class: images a class, at least 1.
        how: "real" draws real images, "noise" standard normal numbers; "kmeans", "herding" and "k-centre" choose real
            images by their pixels, as `limbeck.synthesis.selection` says.
        seed: of what is drawn.

    Raises:
        ValueError: a class has no image at all.
    """
    draws = torch.Generator().manual_seed(seed)
    if how == "noise":
        shape = source.fetch(torch.zeros(1, dtype=torch.int64))["image"].shape[1:]
        return torch.randn(source.classes * per_class, *shape, generator=draws)
    rows = []
    for label in range(source.classes):
        own = (source.labels == label).nonzero().flatten()
        if not len(own):
            raise ValueError(f"class {label} has no image to start from: start from noise, or leave the class out")
        chosen = own[_choose(source, own, min(per_class, len(own)), how, draws)]
        rows.append(chosen.repeat(-(-per_class // len(chosen)))[:per_class])
    return source.fetch(torch.cat(rows))["image"].float()


def _choose(source: Labelled, own: Tensor, count: int, how: Start, draws: torch.Generator) -> Tensor:
    if how == "real":
        return torch.randperm(len(own), generator=draws)[:count]
    return SELECTIONS[how](source.fetch(own)["image"].flatten(1).float(), count, draws)
