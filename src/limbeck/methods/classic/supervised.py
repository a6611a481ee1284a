"""Training on labels alone: the student without a teacher, and the way teachers are made."""

from collections.abc import Iterator

import torch.nn.functional as F
from pydantic import Field

from limbeck.core.batch import Batch
from limbeck.core.call import call, logits_of
from limbeck.core.card import Card
from limbeck.core.method import Method, Update
from limbeck.core.options import OptionsBase
from limbeck.core.registry import register


@register
class Supervised(Method):
    r"""Cross-entropy with the labels, :math:`-\frac1B\sum_b \log p_{b,y_b}`; no teacher takes part."""

    card = Card(
        slug="supervised",
        title="Training on labels alone",
        arxiv="",
        year=1986,
        family="classic",
        task="classification",
        needs=("student", "labels"),
        use="The baseline of every claim, and how the teachers of recipes are made.",
    )

    class Options(OptionsBase):
        """Options of the cross-entropy."""

        label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of each target spread over all classes")

    def step(self, batch: Batch) -> Iterator[Update]:
        logits = logits_of(call(self.student, batch))
        loss = F.cross_entropy(
            logits.float(),
            batch["label"],
            ignore_index=-100,
            reduction="sum",
            label_smoothing=self.options.label_smoothing,
        )
        yield Update("student", loss / batch.size, batch.size)
