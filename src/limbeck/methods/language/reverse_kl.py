"""Word-level distillation with reverse KL: the student keeps to what the teacher finds likely."""

from typing import Literal

from pydantic import Field

from limbeck.core.card import Card
from limbeck.core.registry import register
from limbeck.methods.language.token_method import TokenMethod
from limbeck.objectives.divergences import LogitDivergence, divergence
from limbeck.objectives.topk import TopKDivergence, topk_divergence


@register
class ReverseKL(TokenMethod):
    r"""The student says nothing that the teacher finds unlikely, and may leave out some of what it finds likely.

    .. math:: L = \frac{1}{|M|} \sum_{i \in M} \sum_v q_{iv} \log\frac{q_{iv}}{p_{iv}}

    with teacher :math:`p`, student :math:`q`, and :math:`M` the tokens that count. This is MiniLLM's divergence, token
    by token and on given text; `minillm` measures it over whole sequences of the student's own.
    """

    card = Card(
        slug="reverse-kl",
        title="MiniLLM: Knowledge Distillation of Large Language Models (its divergence on given text)",
        arxiv="2306.08543",
        year=2023,
        family="language",
        task="language-modelling",
        needs=("teacher", "student"),
        use="Where a student too small for all that the teacher says should say a part of it well.",
    )

    class Options(TokenMethod.Options):
        """Weights, temperature, and what stands for the tail of a stored top-k teacher."""

        tail: Literal["bucket", "uniform"] = Field(
            "bucket", description="what a top-k teacher's missing probability becomes; left out it would be infinite"
        )

    def divergence(self) -> LogitDivergence:
        return divergence("reverse-kl")

    def topk_divergence(self) -> TopKDivergence:
        return topk_divergence("reverse-kl", self.options.tail)
