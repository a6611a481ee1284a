"""MTT: images on which training takes the way that it takes on real data (Cazenavette et al., 2022)."""

from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from limbeck.core.batch import Batch
from limbeck.core.card import Card
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo, Method, Update
from limbeck.core.options import OptionsBase
from limbeck.core.randomness import derive, generator
from limbeck.core.registry import register
from limbeck.core.teacher import LiveTeacher, Teacher
from limbeck.synthesis.augmentation import SiameseAugment
from limbeck.synthesis.experts import Trajectories
from limbeck.synthesis.inner_loop import Stateless, Weights, trajectory_loss, unrolled_sgd
from limbeck.synthesis.synthetic_set import SyntheticSet


@register
class MTT(Method):
    r"""A few steps on synthetic images lead from an expert's weights to those it had epochs later on the real data.

    .. math:: \hat\theta_{i+1} = \hat\theta_i - a \nabla_\theta \mathrm{CE}\bigl(f_{\hat\theta_i}(A_i(S_i)), y_i\bigr),
        \quad \hat\theta_0 = \theta^*_t, \qquad
        L = \frac{\lVert \hat\theta_N - \theta^*_{t+M} \rVert^2}{\lVert \theta^*_t - \theta^*_{t+M} \rVert^2}

    for a random expert and a random epoch t below `latest`; gradients go through all N steps. :math:`S_i` are the
    synthetic images, or batches of them, shuffled anew when they are used up; A is the set's siamese augmentation. The
    step size a is trained along where the set has one (its argument `lr`), as its logarithm; else it is `lr`.

    The teacher is a stage of `experts`. The papers step with SGD of rate 100 to 1000 and momentum 0.5, and 1e-5 to 1e-7
    for a: give `log_lr` a factor of its own in `optimizer.lr_multipliers`. The graph of N steps is held unless `chunk`
    says how many steps are recomputed together; about the square root of N holds least. The stage's batches are not
    looked at; micro-batches and processes all do the same work. For ZCA: `data.whiten`.
    """

    card = Card(
        slug="mtt",
        title="Dataset Distillation by Matching Training Trajectories",
        arxiv="2203.11932",
        year=2022,
        family="datasets",
        task="dataset",
        needs=("teacher", "student"),
        use="A small synthetic set on which networks learn as on the real data, where experts can be trained first.",
        tiny={"steps": 3, "segment": 1, "latest": 2, "chunk": 2, "batch_size": 8},
    )

    class Options(OptionsBase):
        """The inner loop and the experts' segments; defaults are those of CIFAR-10 with 10 images a class."""

        steps: int = Field(30, ge=0, le=10_000, description="steps N on synthetic images")
        segment: int = Field(2, ge=1, le=10_000, description="epochs M of an expert that they stand for")
        latest: int = Field(20, ge=1, le=100_000, description="segments start before this epoch T+")
        lr: float = Field(0.001, ge=0, le=100, description="step size a, where the set brings none")
        batch_size: int = Field(0, ge=0, le=1_000_000, description="synthetic images a step; 0 takes all")
        augmentation: bool = Field(True, description="augment the images, as the set says")
        chunk: int = Field(0, ge=0, le=10_000, description="steps recomputed together in the backward pass; 0 for none")

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        if not isinstance(student, SyntheticSet):
            raise IncompatibleError(f"a {type(student).__name__} is no set of images", "take the student synthetic-set")
        if not isinstance(teacher, LiveTeacher) or not isinstance(teacher.model, Trajectories):
            raise IncompatibleError("there are no experts to follow", "take a stage of the method experts as teacher")
        last = self.options.latest - 1 + self.options.segment
        if last > teacher.model.epochs:
            raise IncompatibleError(
                f"segments end at epoch {last}, and the experts were trained for {teacher.model.epochs}",
                "lower latest or segment, or train the experts longer",
            )
        self.augment = SiameseAugment(student.augmentation if self.options.augmentation else "")

    @property
    def set(self) -> SyntheticSet:
        """The student."""
        assert isinstance(self.student, SyntheticSet)
        return self.student

    @property
    def experts(self) -> Trajectories:
        """Whose ways are followed."""
        assert isinstance(self.teacher, LiveTeacher)
        assert isinstance(self.teacher.model, Trajectories)
        return self.teacher.model

    def step(self, batch: Batch) -> Iterator[Update]:
        start, target = self.draw()
        lr = self.set.lr if self.set.lr is not None else self.options.lr
        end = self.follow(start, lr)
        logs = {"step_size": torch.as_tensor(lr).detach()}
        yield Update("student", trajectory_loss(end, target, start), batch.size, logs)

    def draw(self) -> tuple[Weights, Weights]:
        """An expert's weights at the start of a random segment, and at its end."""
        draws = generator(self.clock.seed, "segment")
        expert = int(torch.randint(self.experts.count, (), generator=draws))
        epoch = int(torch.randint(self.options.latest, (), generator=draws))
        images = self.set.images
        return tuple(self.experts.at(expert, at, like=images) for at in (epoch, epoch + self.options.segment))  # type: ignore[return-value]

    def follow(self, weights: Weights, lr: Tensor | float) -> Weights:
        """The weights after N steps on the synthetic images, with the graph to these and to the step size."""
        network, seed, choices = Stateless(self.experts.network), self.clock.seed, self._choices()

        def loss(current: Weights, step: int, images: Tensor, labels: Tensor) -> Tensor:
            rows = choices[step]
            seen = self.augment(images[rows], derive(seed, "augment", step))
            logits = network(current, seen)
            return functional.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels[rows])

        shared = (self.set.images, self.set.labels)
        return unrolled_sgd(weights, loss, shared, lr, self.options.steps, chunk=self.options.chunk)

    def _choices(self) -> list[Tensor]:
        """Which images each step sees."""
        count, size = len(self.set), self.options.batch_size or len(self.set)
        chosen: list[Tensor] = []
        draws = generator(self.clock.seed, "order")
        while len(chosen) < self.options.steps:
            chosen += torch.randperm(count, generator=draws).to(self.set.images.device).split(size)
        return chosen[: self.options.steps]
