"""Word-level distillation with the generalised Jensen-Shannon divergence."""

from pydantic import Field, model_validator

from limbeck.core.card import Card
from limbeck.core.registry import register
from limbeck.methods.language.token_method import TokenMethod
from limbeck.objectives.divergences import LogitDivergence, divergence
from limbeck.objectives.topk import Tail, TopKDivergence, topk_divergence


@register
class JensenShannon(TokenMethod):
    r"""Teacher and student are each compared with a mixture of the two, so that neither can be infinitely wrong.

    .. math:: L = \frac{1}{|M|} \sum_{i \in M}
        \beta\,\mathrm{KL}(p_i \| m_i) + (1-\beta)\,\mathrm{KL}(q_i \| m_i), \qquad m_i = \beta p_i + (1-\beta) q_i

    with teacher :math:`p`, student :math:`q`, and :math:`M` the tokens that count. By convention :math:`\beta = 0` is
    :math:`\mathrm{KL}(p\|q)` and :math:`\beta = 1` is :math:`\mathrm{KL}(q\|p)`, although the formula tends to 0 at
    both ends: near them the loss is small, and a weight of :math:`1/\beta` or :math:`1/(1-\beta)` makes up for it.
    """

    card = Card(
        slug="jsd",
        title="On-Policy Distillation of Language Models (its divergence on given text)",
        arxiv="2306.13649",
        year=2023,
        family="language",
        task="language-modelling",
        needs=("teacher", "student"),
        use="Between forward and reverse KL, with a loss that stays bounded where the two models disagree.",
    )

    class Options(TokenMethod.Options):
        """Weights, temperature, the mixture, and what stands for the tail of a stored top-k teacher."""

        beta: float = Field(0.5, ge=0, le=1, description="share of the teacher in the mixture; 0 forward KL, 1 reverse")
        tail: Tail = Field("bucket", description="what a top-k teacher's missing probability becomes")

        @model_validator(mode="after")
        def _finite(self) -> "JensenShannon.Options":
            if self.tail == "zero" and self.beta == 1:
                raise ValueError("reverse KL (beta 1) is infinite with tail 'zero'; use 'bucket'")
            return self

    def divergence(self) -> LogitDivergence:
        return divergence("jsd", beta=self.options.beta)

    def topk_divergence(self) -> TopKDivergence:
        return topk_divergence("jsd", self.options.tail, beta=self.options.beta)
