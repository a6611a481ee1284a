"""ULD: distillation between models that do not share a tokenizer (Boizard et al., 2024)."""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.card import Card
from limbeck.core.method import DataInfo, Method, Update
from limbeck.core.options import OptionsBase
from limbeck.core.registry import register
from limbeck.core.teacher import Teacher, logits_of_tokens
from limbeck.language.answers import Answers, aligned_groups, answers, both_tokenizers, second_text, shared_vocabulary
from limbeck.language.predictions import TokenReader
from limbeck.objectives.cross_tokenizer import hybrid_distance, merge_rows, universal_logit_distillation
from limbeck.objectives.divergences import log_probabilities, sorted_wasserstein
from limbeck.objectives.tokens import IGNORED_LABEL


@register
class UniversalLogitDistillation(Method):
    r"""The student's sorted probabilities follow the teacher's, place by place: no token has to mean the same to both.

    .. math:: L = w_y\,\mathrm{CE}(q, y) + w\,\frac{1}{B}\sum_b \frac{1}{n_b} \sum_{i \le n_b} \sum_v
        \big| q^{\downarrow}_{biv} - p^{\downarrow}_{biv} \big|

    where :math:`\downarrow` sorts a distribution, and the shorter vocabulary is padded with zeros: the Wasserstein-1
    distance of the two spectra. `plain` pairs the i-th token of the student's answer with the i-th of the teacher's, up
    to the shorter answer. The aligned variants pair groups of tokens that end at the same byte, and give a group one
    distribution: `aligned-bayesian` the last token's times the probabilities of the tokens before it,
    `aligned-observed` the first token's times those after it. `hybrid` (GOLD in TRL) compares tokens whose strings both
    vocabularies have by generalised JSD, all others sorted, over bayesian groups.

    Both terms are means over each item's answer and then over items, so that items weigh the same whatever their
    length. Batches bring the text in the teacher's tokenisation as `teacher_input_ids`, `teacher_attention_mask` and
    `teacher_labels`, and for aligned variants the byte at which each token ends as `ends` and `teacher_ends`.
    """

    card = Card(
        slug="uld",
        title="Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs",
        arxiv="2402.12030",
        year=2024,
        family="language",
        task="language-modelling",
        needs=("teacher", "student"),
        use="When teacher and student have different tokenizers.",
    )

    class Options(OptionsBase):
        """Weights, and what is paired with what."""

        label_weight: float = Field(1.0, ge=0, le=1e6, description="weight of the cross-entropy with the text's tokens")
        weight: float = Field(1.5, ge=0, le=1e6, description="the paper's lambda: weight of the distance")
        temperature: float = Field(1.0, gt=0, le=1000, description="softens both distributions; no factor T² is added")
        variant: Literal["plain", "aligned-observed", "aligned-bayesian", "hybrid"] = Field(
            "plain", description="what is compared: token by token, or groups of tokens that spell the same bytes"
        )
        beta: float = Field(0.5, ge=0, le=1, description="of the JSD of `hybrid`: 0 forward KL, 1 reverse")
        shared_weight: float | None = Field(
            None,
            ge=0,
            le=1,
            description="of the JSD of `hybrid`; the shared part of the teacher's vocabulary if absent",
        )

    student_shared: Tensor
    teacher_shared: Tensor

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        self.read_student = TokenReader(student, data.example)
        second_text(data.example, "teacher_")  # refused now rather than at the first step
        shared = (torch.zeros(0).long(),) * 2
        if self.options.variant == "hybrid":
            shared = shared_vocabulary(*both_tokenizers(data, teacher))
        for side, ids in zip(("student", "teacher"), shared, strict=True):
            self.register_buffer(f"{side}_shared", ids, persistent=False)

    def step(self, batch: Batch) -> Iterator[Update]:
        assert self.teacher is not None
        theirs = second_text(batch, "teacher_")
        teacher = answers(logits_of_tokens(self.teacher.tokens(theirs)), theirs)
        student = answers(self.read_student(batch).logits(), batch, self.read_student.shift)
        labels_loss, distance = cross_entropies(student).mean(), self.distances(student, teacher).mean()
        loss = self.options.label_weight * labels_loss + self.options.weight * distance
        yield Update("student", loss, batch.size, {"cross_entropy": labels_loss, "distance": distance})

    def distances(self, student: Answers, teacher: Answers) -> Tensor:
        """What the two say of each item (items,): 0 where their spectra are equal."""
        if self.options.variant == "plain":
            # The logits are those that predict their label already: no further shift.
            return universal_logit_distillation(
                student.logits,
                teacher.logits,
                student.labels,
                teacher.labels,
                temperature=self.options.temperature,
                shift=False,
            )
        return torch.stack([self.aligned(student, teacher, item) for item in range(len(student.labels))])

    def aligned(self, student: Answers, teacher: Answers, item: int) -> Tensor:
        """The mean distance over one item's groups of tokens."""
        (our_logits, our_ids, our_ends), (their_logits, their_ids, their_ends) = student.item(item), teacher.item(item)
        our_groups, their_groups = aligned_groups(our_ends, their_ends)
        mode: Literal["observed", "bayesian"] = "observed" if "observed" in self.options.variant else "bayesian"
        ours = merge_rows(self._probabilities(our_logits), our_ids, our_groups, mode)
        theirs = merge_rows(self._probabilities(their_logits).detach(), their_ids, their_groups, mode)
        return self.compare(ours, theirs).sum() / max(1, len(our_groups))

    def compare(self, student_probs: Tensor, teacher_probs: Tensor) -> Tensor:
        """One distance a group (groups,)."""
        if self.options.variant != "hybrid":
            return sorted_wasserstein(student_probs, teacher_probs)
        return hybrid_distance(
            student_probs,
            teacher_probs,
            self.student_shared,
            self.teacher_shared,
            beta=self.options.beta,
            shared_weight=self.options.shared_weight,
        )

    def _probabilities(self, logits: Tensor) -> Tensor:
        return log_probabilities(logits, self.options.temperature).exp()


def cross_entropies(student: Answers) -> Tensor:
    """Cross-entropy with the text, the mean over each answer (items,); 0 where an item has none."""
    flat = student.logits.flatten(0, 1)
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    values = F.cross_entropy(flat, student.labels.flatten(), ignore_index=IGNORED_LABEL, reduction="none")
    return values.view_as(student.labels).sum(1) / student.lengths.clamp_min(1)
