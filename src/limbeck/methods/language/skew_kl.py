"""Word-level distillation with DistiLLM's skew divergences."""

from typing import Literal

from pydantic import Field, model_validator

from limbeck.core.card import Card
from limbeck.core.registry import register
from limbeck.methods.language.token_method import TokenMethod
from limbeck.objectives.divergences import LogitDivergence, divergence
from limbeck.objectives.topk import Tail, TopKDivergence, topk_divergence

NAMES = {"forward": "skew-kl", "reverse": "skew-reverse-kl"}
"""Rows of the table of f-divergences."""


@register
class SkewKL(TokenMethod):
    r"""KL to a mixture with a little of the first distribution in it, whose gradients are smaller and never explode.

    .. math:: L = \frac{1}{|M|} \sum_{i \in M} \mathrm{KL}\big(p_i \,\|\, \alpha p_i + (1-\alpha) q_i\big)
        \quad\text{or}\quad \mathrm{KL}\big(q_i \,\|\, (1-\alpha) p_i + \alpha q_i\big)

    with teacher :math:`p`, student :math:`q`, and :math:`M` the tokens that count. At :math:`\alpha = 0` these are
    forward and reverse KL, at :math:`\alpha = 1` they are 0.
    """

    card = Card(
        slug="skew-kl",
        title="DistiLLM: Towards Streamlined Distillation for Large Language Models (its divergences on given text)",
        arxiv="2402.03898",
        year=2024,
        family="language",
        task="language-modelling",
        needs=("teacher", "student"),
        use="Where forward or reverse KL trains unsteadily because teacher and student are far apart.",
    )

    class Options(TokenMethod.Options):
        """Weights, temperature, the mixture, and what stands for the tail of a stored top-k teacher."""

        alpha: float = Field(0.1, ge=0, le=1, description="share of the first distribution in the mixture")
        direction: Literal["forward", "reverse"] = Field(
            "forward", description="whether the teacher or the student is the first distribution"
        )
        tail: Tail = Field("bucket", description="what a top-k teacher's missing probability becomes")

        @model_validator(mode="after")
        def _finite(self) -> "SkewKL.Options":
            if self.tail == "zero" and self.direction == "reverse" and self.alpha == 0:
                raise ValueError("reverse KL (alpha 0) is infinite with tail 'zero'; use 'bucket'")
            return self

    def divergence(self) -> LogitDivergence:
        return divergence(NAMES[self.options.direction], alpha=self.options.alpha)

    def topk_divergence(self) -> TopKDivergence:
        return topk_divergence(NAMES[self.options.direction], self.options.tail, alpha=self.options.alpha)
