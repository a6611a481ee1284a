"""DM: synthetic images whose features have the class means of the real ones'."""

from collections.abc import Iterator

import torch

from limbeck.core.batch import Batch
from limbeck.core.card import Card
from limbeck.core.distributed import gather
from limbeck.core.method import Update
from limbeck.core.registry import register
from limbeck.methods.datasets.dataset_method import DatasetMethod, NetworkOptions
from limbeck.synthesis.matching import class_means, mean_gap


@register
class DM(DatasetMethod):
    r"""Synthetic images are moved until random networks embed them, on average, where they embed the real ones.

    .. math:: L = \sum_c \Big\lVert \frac{1}{|T_c|} \sum_{x \in T_c} \psi_\theta(x)
              - \frac{1}{|S_c|} \sum_{s \in S_c} \psi_\theta(s) \Big\rVert^2

    :math:`\psi_\theta` is what the head of a ConvNet sees; its weights are drawn anew at each step and never trained.
    The paper steps with SGD of rate 1 and momentum 0.5, 20,000 times, on 256 real images a class. Here a step's real
    images of all classes are one batch, so `batch_size` is 256 times the number of classes, about as many of each.

    The means couple the items of a batch: gradient accumulation changes the loss, several processes do not.
    """

    card = Card(
        slug="dm",
        title="Dataset Condensation with Distribution Matching",
        arxiv="2110.04181",
        year=2021,
        family="datasets",
        task="dataset",
        needs=("student", "labels"),
        use="The fastest baseline of data-set distillation: no network is trained.",
        couples_batch=True,
        tiny={"width": 4, "depth": 2},
    )

    class Options(NetworkOptions):
        """Only the network."""

    def step(self, batch: Batch) -> Iterator[Update]:
        network = self.fresh_network()
        with torch.no_grad():
            features = gather(network.embed(self.real(batch)))
        real, counts = class_means(features, gather(batch["label"]), self.data.classes)
        found, _ = class_means(network.embed(self.synthetic()), self.set.hard_labels, self.data.classes)
        yield Update("student", mean_gap(real, found, counts), batch.size)
