"""Training on text alone: the student without a teacher, and the way language models that teach are made."""

from collections.abc import Iterator

from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.card import Card
from limbeck.core.method import DataInfo, Method, Update
from limbeck.core.options import OptionsBase
from limbeck.core.registry import register
from limbeck.core.teacher import Teacher
from limbeck.language.predictions import TokenReader, kept_labels
from limbeck.methods.language.token_method import next_token_loss


@register
class NextToken(Method):
    r"""Cross-entropy with the tokens of the text, :math:`-\frac{1}{|M|}\sum_{i \in M} \log q_{i,y_i}`; no teacher.

    With :math:`M` the tokens that count; of masked language models the hidden ones.
    """

    card = Card(
        slug="next-token",
        title="Training on text alone",
        arxiv="",
        year=2003,
        family="language",
        task="language-modelling",
        needs=("student",),
        use="The baseline of every claim on language, and how the teachers of recipes are made.",
    )

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        self.read_student = TokenReader(student, data.example)

    def step(self, batch: Batch) -> Iterator[Update]:
        labels = kept_labels(batch, self.read_student.shift)
        yield Update("student", next_token_loss(self.read_student(batch), labels), len(labels))
