"""Word-level distillation with forward KL, the plain baseline of language models."""

from pydantic import Field

from limbeck.core.card import Card
from limbeck.core.registry import register
from limbeck.methods.language.token_method import TokenMethod
from limbeck.objectives.divergences import LogitDivergence, divergence
from limbeck.objectives.topk import Tail, TopKDivergence, topk_divergence


@register
class ForwardKL(TokenMethod):
    r"""The student covers every continuation that the teacher finds possible, on given text.

    .. math:: L = \frac{1}{|M|} \sum_{i \in M} \sum_v p_{iv} \log\frac{p_{iv}}{q_{iv}}

    with teacher :math:`p`, student :math:`q`, and :math:`M` the tokens that count.
    """

    card = Card(
        slug="kl",
        title="Sequence-Level Knowledge Distillation (word-level baseline)",
        arxiv="1606.07947",
        year=2016,
        family="language",
        task="language-modelling",
        needs=("teacher", "student"),
        use="The first thing to try when teacher and student share a tokenizer and there is text to train on.",
    )

    class Options(TokenMethod.Options):
        """Weights, temperature, and what stands for the tail of a stored top-k teacher."""

        tail: Tail = Field("bucket", description="what a top-k teacher's missing probability becomes")

    def divergence(self) -> LogitDivergence:
        return divergence("forward-kl")

    def topk_divergence(self) -> TopKDivergence:
        return topk_divergence("forward-kl", self.options.tail)
