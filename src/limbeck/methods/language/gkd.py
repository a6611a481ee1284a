"""GKD: learning from the teacher's judgement of the student's own text (Agarwal et al., 2023)."""

from collections.abc import Iterator

from pydantic import Field
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.card import Card
from limbeck.core.method import DataInfo, Update
from limbeck.core.options import OptionsBase
from limbeck.core.registry import register
from limbeck.core.teacher import Teacher
from limbeck.language.sampler import Mixture, OnPolicySampler, WritingOptions
from limbeck.methods.language.token_method import TokenMethod
from limbeck.objectives.divergences import LogitDivergence, divergence
from limbeck.objectives.topk import TopKDivergence, topk_divergence


@register
class GKD(TokenMethod):
    r"""Teacher and student are compared at each token of what the student itself writes, or of given text in its place.

    .. math:: L = \mathbb{E}_{y} \frac{1}{|y|} \sum_i \mathrm{JSD}_\beta\big(p(\cdot|x, y_{<i}) \,\|\,
        q(\cdot|x, y_{<i})\big), \qquad y \sim q(\cdot|x) \text{ if } u \le \lambda, \ u \sim U(0, 1)

    and otherwise the data's own :math:`y`, or the teacher's with `seq_kd`; no gradient flows through the sampling.
    :math:`\beta = 0` is :math:`\mathrm{KL}(p\|q)` and :math:`\beta = 1` is :math:`\mathrm{KL}(q\|p)` by convention, so
    :math:`\lambda = \beta = 1` is on-policy reverse KL.

    One draw of u couples the items of a batch: under gradient accumulation, and on each rank, every micro-batch draws
    and writes for itself.
    """

    card = Card(
        slug="gkd",
        title="On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
        arxiv="2306.13649",
        year=2023,
        family="language",
        task="language-modelling",
        needs=("teacher", "student", "prompts"),
        use="When the student is to write long texts and would drift away from those that it was trained on.",
        couples_batch=True,
        tiny={"max_new_tokens": 4, "prompt_tokens": 2, "seq_kd": True},
    )

    class Options(WritingOptions):
        """The mixture, the divergence, and how continuations are written; defaults of TRL."""

        lam: float = Field(0.5, ge=0, le=1, description="lambda, the share of batches that the student writes")
        seq_kd: bool = Field(False, description="the teacher writes the other batches, in place of the data")
        beta: float = Field(0.5, ge=0, le=1, description="of the divergence: 0 forward KL, 1 reverse KL")
        temperature: float = Field(1.0, gt=0, le=1000, description="softens both distributions; no factor T² is added")
        sampling_temperature: float = Field(
            0.9, ge=0, le=1000, description="of the distribution that continuations are drawn from; 0 is greedy"
        )

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        policy = Mixture(self.options.lam, "teacher" if self.options.seq_kd else "data")
        self.sampler = OnPolicySampler(policy, self.options, data)

    def divergence(self) -> LogitDivergence:
        return divergence("jsd", beta=self.options.beta)

    def topk_divergence(self) -> TopKDivergence:
        return topk_divergence("jsd", "bucket", beta=self.options.beta)

    def step(self, batch: Batch) -> Iterator[Update]:
        yield self.match(self.sampler(self.student, self.teacher, batch))
