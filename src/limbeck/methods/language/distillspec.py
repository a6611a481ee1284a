"""DistillSpec: a draft model that speculative decoding accepts more often (Zhou et al., 2023)."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.card import Card
from limbeck.core.method import DataInfo, Update
from limbeck.core.options import OptionsBase
from limbeck.core.registry import register
from limbeck.core.teacher import Teacher
from limbeck.language.sampler import Mixture, OnPolicySampler, TeacherTexts, WritingOptions
from limbeck.methods.language.token_method import TokenMethod
from limbeck.objectives.divergences import LogitDivergence, divergence
from limbeck.objectives.topk import TopKDivergence, topk_divergence


@register
class DistillSpec(TokenMethod):
    r"""The draft (the student) learns to say what the target (the teacher) would, so that fewer of its drafts are lost.

    A drafted token is accepted with probability :math:`\sum_v \min(p_v, q_v) = 1 - \mathrm{TVD}(p, q)`, the target's
    distribution p against the draft's q. The loss is a divergence of the two over the tokens of responses,

    .. math:: L = \mathbb{E}_{x, y} \frac{1}{|y|} \sum_i D\big(p(\cdot|x, y_{<i}) \,\|\, q(\cdot|x, y_{<i})\big)

    with y the data's own, the target's (written once for each prompt and kept), the draft's own, anew for each batch,
    or a mixture of draft and data. The target does not change, and with it what speculative decoding puts out.

    One draw of the mixture couples the items of a batch: under gradient accumulation, and on each rank, every
    micro-batch draws and writes for itself.
    """

    card = Card(
        slug="distillspec",
        title="DistillSpec: Improving Speculative Decoding via Knowledge Distillation",
        arxiv="2310.08461",
        year=2023,
        family="language",
        task="language-modelling",
        needs=("teacher", "student", "prompts"),
        use="To make a draft model for speculative decoding; pass the result as `assistant_model` of transformers.",
        couples_batch=True,
        tiny={"max_new_tokens": 4, "prompt_tokens": 2, "data": "mixed"},
    )

    class Options(WritingOptions):
        """Whose text, and which divergence: which is best depends on the task and on how will be decoded."""

        data: Literal["draft", "fixed", "target", "mixed"] = Field(
            "draft", description="whose responses: the draft's own (on-policy), the data's, the target's, or a mixture"
        )
        draft_share: float = Field(0.5, ge=0, le=1, description="share of batches that the draft writes if `mixed`")
        loss: Literal["forward-kl", "jsd", "reverse-kl", "total-variation"] = Field(
            "forward-kl", description="D; total variation is the rejection rate itself, the others are easier to follow"
        )
        temperature: float = Field(1.0, gt=0, le=1000, description="divides both logits; that of decoding, if not 0")

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        share = {"draft": 1.0, "mixed": self.options.draft_share}.get(self.options.data, 0.0)
        self.sampler = OnPolicySampler(Mixture(share), self.options, data)
        self.target_texts = TeacherTexts(self.options, data) if self.options.data == "target" else None

    def divergence(self) -> LogitDivergence:
        return divergence(self.options.loss)

    def topk_divergence(self) -> TopKDivergence:
        return topk_divergence(self.options.loss, "bucket")

    def step(self, batch: Batch) -> Iterator[Update]:
        if self.target_texts is not None:
            batch = self.target_texts(self.student, self.teacher, batch)
        yield self.match(self.sampler(self.student, self.teacher, batch))
