"""Contrastive representation distillation (Tian et al., 2019)."""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from limbeck.core.batch import Batch
from limbeck.core.card import Card
from limbeck.core.distributed import gather, process_state
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo, Update
from limbeck.core.options import OptionsBase
from limbeck.core.randomness import generator
from limbeck.core.registry import register
from limbeck.core.teacher import Teacher
from limbeck.methods.classic.feature_method import FeatureMethod, pooled
from limbeck.objectives.contrast_sampling import new_bank, other_class_negatives, uniform_negatives
from limbeck.objectives.contrastive import crd_normaliser, crd_scores, moved_entries, nce


@register
class ContrastiveDistillation(FeatureMethod):
    r"""The student tells the teacher's memory of an item from its memories of other items, and the other way round.

    .. math:: L = w_y\,\mathrm{CE}(z_s, y) + w \bigl(\mathrm{NCE}(P_s) + \mathrm{NCE}(P_t)\bigr), \qquad
        P_s = \frac{1}{Z_s} \exp(\langle v_s, m_t \rangle / \tau), \quad
        P_t = \frac{1}{Z_t} \exp(\langle v_t, m_s \rangle / \tau)

    where v are unit embeddings of the last stage's pooled features by two linear maps, both trained and dropped at the
    end, and m rows of two memory banks with one row an item: that of the item itself and of K others. Z is fixed on the
    first batch. After each update the batch's rows move towards its embeddings,
    :math:`m \leftarrow \mathrm{norm}(\mu m + (1 - \mu) v)`.

    Through banks and Z it couples the items of a batch: ranks gather embeddings, so that all hold the same banks, and
    under gradient accumulation the first micro-batch alone fixes Z.
    """

    card = Card(
        slug="crd",
        title="Contrastive Representation Distillation",
        arxiv="1910.10699",
        year=2019,
        family="classic",
        task="classification",
        needs=("teacher", "student", "features", "labels", "index"),
        use="Between any two architectures, where the structure of the representation matters; needs many epochs.",
        couples_batch=True,
        tiny={"negatives": 16, "embedding_dim": 8},
    )

    class Options(FeatureMethod.Options):
        """Embedding, negatives and banks; defaults of the CIFAR recipe."""

        weight: float = Field(0.8, ge=0, le=1e6, description="weight of the sum of both sides' losses")
        embedding_dim: int = Field(128, ge=1, le=65536, description="dimension of the embeddings")
        negatives: int = Field(16384, ge=1, le=2**24, description="K, memories of other items that each is told from")
        negatives_from: Literal["other_classes", "everywhere"] = Field(
            "other_classes", description="where they are drawn; everywhere needs no labels"
        )
        contrast_temperature: float = Field(0.07, gt=0, le=1000, description="tau, divides the inner products")
        momentum: float = Field(0.5, ge=0, le=1, description="mu, share of the old memory that is kept")

    student_bank: Tensor
    teacher_bank: Tensor
    student_normaliser: Tensor
    teacher_normaliser: Tensor
    classes: Tensor

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        self._check(data)
        for side in ("student", "teacher"):
            self.register_buffer(f"{side}_bank", new_bank(data.items, self.options.embedding_dim))
            self.register_buffer(f"{side}_normaliser", torch.zeros(()))  # 0: not fixed yet
        if data.labels is not None:  # the data's, not the method's: not saved
            # Items without a label are a class of their own: other classes may draw them.
            known = torch.where(data.labels < 0, data.classes, data.labels)
            self.register_buffer("classes", known, persistent=False)
        self._drawn_at, self._parts = self.clock, 0

    def connect(self, student_features: list[Tensor], teacher_features: list[Tensor]) -> None:
        for side, features in {"student": student_features, "teacher": teacher_features}.items():
            width = torch.cat([pooled(feature) for feature in features], 1).shape[1]
            self.connectors[side] = nn.Linear(width, self.options.embedding_dim)

    def default_layers(self, model: nn.Module) -> list[str]:
        return super().default_layers(model)[-1:]

    def step(self, batch: Batch) -> Iterator[Update]:
        seen = self.observe(batch)
        student, teacher = self.embed("student", seen.student_features), self.embed("teacher", seen.teacher_features)
        pairs = self.draw(batch)
        student_loss = self.contrast(student, self.teacher_bank, pairs, self.student_normaliser)
        teacher_loss = self.contrast(teacher, self.student_bank, pairs, self.teacher_normaliser)
        yield self.combine(seen, student_loss + teacher_loss, batch)
        self.remember(self.student_bank, batch["index"], student)
        self.remember(self.teacher_bank, batch["index"], teacher)

    def embed(self, side: str, features: list[Tensor]) -> Tensor:
        """Unit embeddings (items, dim) of one side's pooled features."""
        together = torch.cat([pooled(feature) for feature in features], 1)
        # In the precision of the banks, also where autocast made the linear map's output half as long.
        return functional.normalize(self.connectors[side](together).to(self.student_bank.dtype), dim=1)

    def draw(self, batch: Batch) -> Tensor:
        """Rows of the banks (items, 1 + negatives) that each item is compared with, its own first."""
        index, draws = gather(batch["index"]), self._draws(batch["index"].device)
        if self.options.negatives_from == "everywhere":
            pairs = uniform_negatives(index, self.options.negatives, self.data.items, generator=draws)
        else:
            pairs = other_class_negatives(index, self.options.negatives, self.classes, generator=draws)
        return pairs.chunk(len(index) // batch.size)[process_state().process_index]

    def contrast(self, embedding: Tensor, bank: Tensor, pairs: Tensor, normaliser: Tensor) -> Tensor:
        """One side's loss against the other's bank; fixes the side's Z if this is the first batch."""
        scores = crd_scores(embedding, bank, pairs, temperature=self.options.contrast_temperature)
        estimate = gather(crd_normaliser(scores, samples=len(bank))[None]).mean()
        normaliser.copy_(torch.where(normaliser > 0, normaliser, estimate))  # on the device: no look at its value
        return nce(scores / normaliser, samples=len(bank))

    @torch.no_grad()
    def remember(self, bank: Tensor, index: Tensor, embedding: Tensor) -> None:
        """Moves the bank's rows of this batch, of all ranks, towards their new embeddings."""
        index, embedding = gather(index), gather(embedding.detach())
        entries = bank[index]
        moved = moved_entries(entries, embedding, momentum=self.options.momentum).to(bank.dtype)
        # A batch that was skipped for a NaN must not live on in the bank.
        bank.index_copy_(0, index, torch.where(moved.isfinite(), moved, entries))

    def _draws(self, device: torch.device) -> torch.Generator:
        """A stream for this micro-batch that all ranks share, so that they draw what one process would."""
        if self._drawn_at is not self.clock:
            self._drawn_at, self._parts = self.clock, 0
        self._parts += 1
        return generator(self.clock.seed, self._parts, device=device)

    def _check(self, data: DataInfo) -> None:
        if "index" not in data.example:
            raise IncompatibleError("the data do not number their items", "add the tensor index to the batches")
        if self.options.negatives_from == "other_classes" and (data.labels is None or data.classes < 2):
            raise IncompatibleError(
                "negatives of other classes need labels of at least two classes", "set negatives_from: everywhere"
            )
