"""Synthetic sets from plain arguments, as recipes name them and folders keep them."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from limbeck.core.errors import IncompatibleError
from limbeck.core.randomness import derive
from limbeck.models.configs import Augmentation, Start, SyntheticSetConfig
from limbeck.synthesis.synthetic_set import SyntheticSet, first_images
from limbeck.synthesis.whitening import ZCA

if TYPE_CHECKING:
    from limbeck.data.source import Source

_ALL: tuple[Augmentation, ...] = ("color", "crop", "cutout", "flip", "scale", "rotate")


class SyntheticImages(SyntheticSet):
    """`per_class` images of each class, class after class; see `SyntheticSetConfig`.

    They are noise until `begin` gives them what `start` says; runs call it once the data are normalised.

    Attributes:
        config: all constructor arguments as plain data; `SyntheticImages(**config)` rebuilds the set's shape.
    """

    def __init__(
        self,
        channels: int = 1,
        height: int = 32,
        width: int = 32,
        classes: int = 10,
        per_class: int = 10,
        start: Start = "real",
        augmentation: tuple[Augmentation, ...] = _ALL,
        soft: bool = False,
        lr: float | None = None,
        begun: bool = False,
        whitened: bool = False,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        made = SyntheticSetConfig(**arguments)
        labels = torch.arange(made.classes).repeat_interleave(made.per_class)
        if made.soft:
            labels = torch.nn.functional.one_hot(labels, made.classes).float()
        images = torch.randn(len(labels), made.channels, made.height, made.width)
        super().__init__(images, labels, made.lr, made.augmentation)
        if made.whitened:
            self.whitening = ZCA(images[0].numel())
        self.config: dict[str, Any] = made.model_dump(mode="json")

    def begin(self, source: "Source", seed: int) -> None:
        """Fills the images as `start` says, unless they were filled before: by a stage, a run or a folder.

        Raises:
            IncompatibleError: the source is of another shape, or lacks images of a class.
        """
        if self.config["begun"]:
            return
        shape, classes = tuple(source.info().example["image"].shape[1:]), source.classes
        if (shape, classes) != (tuple(self.images.shape[1:]), self.config["classes"]):
            raise IncompatibleError(
                f"the set holds {self.config['classes']} classes of images {tuple(self.images.shape[1:])}, "
                f"and the data {classes} of {shape}"
            )
        try:
            images = first_images(source, self.config["per_class"], self.config["start"], derive(seed, "set") % 2**63)
        except ValueError as error:
            raise IncompatibleError(str(error)) from error
        with torch.no_grad():
            self.images.copy_(images)
        self.config["begun"] = True

    def note_whitening(self, whitening: ZCA) -> None:
        """Keeps how the images are whitened, as `SyntheticSet.note_whitening`, and notes that for loading."""
        super().note_whitening(whitening)
        self.config["whitened"] = True

    def set_labels(self, labels: Tensor) -> None:
        """Exchanges the labels, as `SyntheticSet.set_labels`, and notes their kind for loading."""
        super().set_labels(labels)
        if self.soft and self.labels.shape[1] != self.config["classes"]:
            raise ValueError(f"{self.labels.shape[1]} probabilities a label, and {self.config['classes']} classes")
        self.config["soft"] = self.soft
