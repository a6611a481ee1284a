"""DC and DSA: synthetic images that give a network in training the gradients of the real ones."""

from collections.abc import Iterator, Mapping

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from limbeck.core.batch import Batch
from limbeck.core.card import Card
from limbeck.core.distributed import gather
from limbeck.core.method import DataInfo, Update
from limbeck.core.options import OptionsBase
from limbeck.core.randomness import derive, generator
from limbeck.core.registry import register
from limbeck.core.teacher import Teacher
from limbeck.methods.datasets.dataset_method import DatasetMethod, NetworkOptions
from limbeck.synthesis.matching import gradient_gap
from limbeck.synthesis.network import redraw


@register
class DC(DatasetMethod):
    r"""Synthetic images are moved until they give a network, as it learns from them, the gradients of the real ones.

    .. math:: L = \sum_c D\big(\nabla_\theta \ell(T_c), \nabla_\theta \ell(S_c)\big), \qquad
              D(g, h) = \sum_{\text{rows } r} \Big(1 - \frac{\langle g_r, h_r \rangle}{|g_r| |h_r| + 10^{-6}}\Big)

    :math:`\ell` is the cross-entropy of one class's images, real :math:`T_c` or synthetic :math:`S_c`; rows are output
    channels, and biases and norms do not count. The weights :math:`\theta` are drawn every `outer` steps; after each of
    the steps between, SGD trains them on the synthetic set for `inner` epochs.

    With `augmentation` this is DSA (Zhao and Bilen, 2021), without it DC. The papers match 256 real images a class;
    here a step's real images of all classes are one batch, about as many of each. They step with SGD of rate 0.1 and
    momentum 0.5; `outer` and `inner` are 1 and 1 for one image a class, 10 and 50 for ten, 50 and 10 for fifty.

    A class's gradients couple the items of a batch: gradient accumulation changes the loss, several processes do not.
    """

    card = Card(
        slug="dc",
        title="Dataset Condensation with Gradient Matching",
        arxiv="2006.05929",
        year=2020,
        family="datasets",
        task="dataset",
        needs=("student", "labels"),
        use="A baseline of data-set distillation for few images a class; each step costs two passes a class.",
        couples_batch=True,
        tiny={"width": 4, "depth": 2, "outer": 2, "inner": 2},
    )

    class Options(NetworkOptions):
        """How the network learns between the steps."""

        outer: int = Field(10, ge=1, le=10_000, description="steps with one network before another is drawn")
        inner: int = Field(50, ge=0, le=10_000, description="epochs on the synthetic set after each of these steps")
        network_lr: float = Field(0.01, ge=0, le=1000, description="rate of the SGD of these epochs")
        network_batch: int = Field(256, ge=1, le=1_000_000, description="synthetic images at a time in these epochs")

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        # The network learns, yet belongs to no player and no result: buffers, which checkpoints keep.
        self._names = {name: "network_" + name.replace(".", "_") for name, _ in self._network[0].named_parameters()}
        for name, weight in self._network[0].named_parameters():
            self.register_buffer(self._names[name], weight.detach().clone())

    def step(self, batch: Batch) -> Iterator[Update]:
        if self.clock.step % self.options.outer == 0:
            self._draw_network()
        images, labels = gather(batch["image"]), gather(batch["label"])
        real, synthetic, own = self.augmented(images, labels), self.synthetic(), self.set.hard_labels
        weights, gaps = self._weights(), []
        for label in range(self.data.classes):
            mine, theirs = labels == label, own == label
            if not mine.any():
                continue
            wanted = self._gradient(weights, real[mine], labels[mine], keep_graph=False)
            given = self._gradient(weights, synthetic[theirs], own[theirs], keep_graph=True)
            gaps.append(gradient_gap(wanted, given))
        # A batch of nothing but unlabelled items asks for nothing.
        loss = torch.stack(gaps).sum() if gaps else 0 * self.set.images.sum()
        yield Update("student", loss, batch.size)

    def after_update(self, player: str, logs: Mapping[str, Tensor]) -> None:
        """The network's epochs on the set, unless the next step draws another network anyway."""
        if (self.clock.step + 1) % self.options.outer == 0:
            return
        weights, draws = self._weights(), generator(self.clock.seed, "inner")
        images, labels = (part.detach() for part in self.set.batch())
        for epoch in range(self.options.inner):
            order = torch.randperm(len(images), generator=draws).to(images.device)
            for number, rows in enumerate(order.split(self.options.network_batch)):
                seed = derive(self.clock.seed, "inner", epoch, number)
                seen = self.augment(images[rows], seed, each=True)
                gradient = self._gradient(weights, seen, labels[rows], keep_graph=False)
                for weight, change in zip(weights.values(), gradient, strict=True):
                    weight.detach().sub_(self.options.network_lr * change)
        self._keep(weights)

    def _gradient(
        self, weights: dict[str, Tensor], images: Tensor, labels: Tensor, keep_graph: bool
    ) -> tuple[Tensor, ...]:
        """The gradient of the cross-entropy in the weights; with its own graph, that of the images, where asked."""
        logits = functional_call(self._network[0], weights, (images,))
        loss = functional.cross_entropy(logits.to(weights["head.bias"]), labels)
        return torch.autograd.grad(loss, list(weights.values()), create_graph=keep_graph)

    def _weights(self) -> dict[str, Tensor]:
        """The network's weights by name, as leaves that gradients can be taken in; copies of the buffers."""
        return {name: self.get_buffer(kept).detach().clone().requires_grad_() for name, kept in self._names.items()}

    def _keep(self, weights: Mapping[str, Tensor]) -> None:
        for name, kept in self._names.items():
            self.get_buffer(kept).copy_(weights[name].detach())

    def _draw_network(self) -> None:
        redraw(self._network[0], generator(self.clock.seed, "network"))
        self._keep(dict(self._network[0].named_parameters()))
