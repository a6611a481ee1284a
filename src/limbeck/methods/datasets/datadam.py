"""DataDAM: synthetic images that random networks attend to, on average, as they attend to real ones."""

from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.card import Card
from limbeck.core.distributed import gather
from limbeck.core.method import Update
from limbeck.core.registry import register
from limbeck.methods.datasets.dataset_method import DatasetMethod, NetworkOptions
from limbeck.synthesis.matching import class_means, mean_gap, spatial_attention
from limbeck.synthesis.network import PooledConvNet


@register
class DataDAM(DatasetMethod):
    r"""Synthetic images are moved until random networks attend to the same places of them as of the real ones.

    .. math:: A_l(x) = \frac{a_l(x)}{\lVert a_l(x) \rVert_2}, \qquad a_l(x) = \sum_k |F_l(x)_k|^p

    .. math:: L = w \sum_{l < D} \sum_c \big\lVert \bar A_l(T_c) - \bar A_l(S_c) \big\rVert^2
              + w \lambda \sum_c \big\lVert \bar \psi(T_c) - \bar \psi(S_c) \big\rVert^2

    The bar is the mean over the images of a class, real :math:`T_c` or synthetic :math:`S_c`; :math:`F_l` is the map
    after the ReLU of block :math:`l`. Of the last block no attention is taken: its flattened output :math:`\psi` enters
    as it is. The ConvNet's weights are drawn anew at each step and never trained.

    The paper steps with SGD of rate 1 (10 from 100 images a class on) and momentum 0.5, 20,000 times. It draws 128 real
    images a class, the published code 64; here a step's real images of all classes are one batch, so `batch_size` is
    that times the number of classes, about as many of each. The published code attends with p = 1.

    The means couple the items of a batch: gradient accumulation changes the loss, several processes do not. Networks of
    other kinds than the paper's ConvNet are left out.
    """

    card = Card(
        slug="datadam",
        title="DataDAM: Efficient Dataset Distillation with Attention Matching",
        arxiv="2310.00093",
        year=2023,
        family="datasets",
        task="dataset",
        needs=("student", "labels"),
        use="To distil a data set at the cost of forward passes, where layers before the last should have their say.",
        couples_batch=True,
        tiny={"width": 4, "depth": 3},
    )

    class Options(NetworkOptions):
        """How attention is measured, and what its terms weigh."""

        depth: int = Field(3, ge=2, le=8, description="blocks of the network: 3 for 32 pixels, one more for twice")
        power: float = Field(4.0, gt=0, le=16, description="power p of the activations in attention; the code's is 1")
        weight: float = Field(100.0, ge=0, le=1e9, description="weight w of both terms")
        balance: float = Field(0.01, ge=0, le=1e6, description="share lambda of the last features, to attention's 1")

    def step(self, batch: Batch) -> Iterator[Update]:
        network = self.fresh_network()
        with torch.no_grad():
            looked = [gather(part) for part in self._look(network, self.real(batch))]
        found = self._look(network, self.synthetic())
        gaps = self._gaps(looked, gather(batch["label"]), found)
        attention, features = torch.stack(gaps[:-1]).sum(), gaps[-1]
        loss = self.options.weight * (attention + self.options.balance * features)
        yield Update("student", loss, batch.size, {"attention": attention, "features": features})

    def _look(self, network: PooledConvNet, images: Tensor) -> list[Tensor]:
        """Attention (images, places) of every block but the last, then its features (images, dims)."""
        maps, features = network.maps(images)
        return [*(spatial_attention(part, self.options.power) for part in maps[:-1]), features]

    def _gaps(self, looked: list[Tensor], labels: Tensor, found: list[Tensor]) -> list[Tensor]:
        """How far the class means are apart, a number for each thing looked at."""
        gaps = []
        for real, synthetic in zip(looked, found, strict=True):
            means, counts = class_means(real, labels, self.data.classes)
            own, _ = class_means(synthetic, self.set.hard_labels, self.data.classes)
            gaps.append(mean_gap(means, own, counts))
        return gaps
