"""Parent of the methods that match synthetic images with real ones under networks with random weights."""

import copy
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo, Method
from limbeck.core.options import OptionsBase
from limbeck.core.randomness import derive, generator
from limbeck.core.teacher import Teacher
from limbeck.synthesis.augmentation import SiameseAugment, augment_classes
from limbeck.synthesis.network import PooledConvNet, redraw
from limbeck.synthesis.synthetic_set import SyntheticSet


class NetworkOptions(OptionsBase):
    """The network that looks at both kinds of images, and whether they are augmented for it."""

    width: int = Field(128, ge=1, le=4096, description="channels of every block of the network")
    depth: int = Field(3, ge=1, le=8, description="blocks of the network: 3 for 32 pixels, one more for twice as many")
    norm: Literal["instance", "none"] = Field("instance", description="normalisation after each convolution")
    augmentation: bool = Field(True, description="augment real and synthetic images alike, as the set says")


class DatasetMethod(Method):
    """A synthetic set matched with the real images of a batch, class by class; a class that a batch lacks waits."""

    class Options(NetworkOptions):
        """What these methods have in common."""

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        if not isinstance(student, SyntheticSet):
            raise IncompatibleError(f"a {type(student).__name__} is no set of images", "take the student synthetic-set")
        if not data.classes or "image" not in data.example:
            raise IncompatibleError("a synthetic set needs images with classes", "name data that have both")
        self.augment = SiameseAugment(student.augmentation if self.options.augmentation else "")
        # In a list, since it is no part of the state: its weights are drawn anew.
        self._network = [self.build_network()]

    @property
    def set(self) -> SyntheticSet:
        """The student."""
        assert isinstance(self.student, SyntheticSet)
        return self.student

    def build_network(self) -> PooledConvNet:
        """A network for the data's images, whose weights get no gradient."""
        channels, height, side = self.data.example["image"].shape[1:]
        shape = {"width": self.options.width, "depth": self.options.depth, "norm": self.options.norm}
        return PooledConvNet(channels, height, side, self.data.classes, **shape).requires_grad_(False)

    def fresh_network(self) -> PooledConvNet:
        """The network with the weights of this step; the same in all processes and micro-batches."""
        network = copy.deepcopy(self._network[0])  # the last one may still be part of a graph
        redraw(network, generator(self.clock.seed, "network"))
        return network.to(self.set.images)

    def augmented(self, images: Tensor, labels: Tensor) -> Tensor:
        """Images changed in one way a class, the same for every call within a step."""
        return augment_classes(self.augment, images, labels, derive(self.clock.seed, "augment"))

    def real(self, batch: Batch) -> Tensor:
        """The batch's images, augmented."""
        with torch.no_grad():
            return self.augmented(batch["image"], batch["label"])

    def synthetic(self) -> Tensor:
        """All images of the set, augmented, with their graph."""
        return self.augmented(self.set.images, self.set.hard_labels)
