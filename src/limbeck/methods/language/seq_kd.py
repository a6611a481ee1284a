"""Sequence-level distillation: the student learns the texts that the teacher writes (Kim & Rush, 2016)."""

from collections.abc import Iterator

from pydantic import Field, model_validator
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.card import Card
from limbeck.core.method import DataInfo, Method, Update
from limbeck.core.options import OptionsBase
from limbeck.core.registry import register
from limbeck.core.teacher import Teacher
from limbeck.language.predictions import TokenReader, kept_labels
from limbeck.language.sampler import TeacherTexts, WritingOptions
from limbeck.methods.language.token_method import next_token_loss


@register
class SequenceLevelKD(Method):
    r"""Plain training on what the teacher writes after each prompt: the mode of its distribution over whole texts.

    .. math:: L = -\frac{1}{|M|} \sum_{i \in M} \log q(\hat y_i | x, \hat y_{<i}), \qquad
        \hat y \approx \arg\max_y p(y|x)

    by beam search, or greedily, or drawn from p. This is forward KL over sequences with the teacher's distribution
    standing on :math:`\hat y` alone. A response is written when its item first comes by, and kept in the checkpoints:
    4 bytes a token, so items · `max_new_tokens` · 4 in all.
    """

    card = Card(
        slug="seq-kd",
        title="Sequence-Level Knowledge Distillation",
        arxiv="1606.07947",
        year=2016,
        family="language",
        task="language-modelling",
        needs=("teacher", "student", "prompts", "index"),
        use="When only the teacher's texts matter, or its tokenizer gives the student no distribution to learn.",
        tiny={"max_new_tokens": 4, "prompt_tokens": 2, "beams": 2},
    )

    class Options(WritingOptions):
        """How the teacher decodes: by beam search, or greedily with one beam, or by sampling with a temperature."""

        beams: int = Field(5, ge=1, le=1024, description="width of the beam search, whose best text is taken")
        sampling_temperature: float = Field(
            0.0, ge=0, le=1000, description="above 0 texts are drawn, with one beam, from a distribution softened by it"
        )

        @model_validator(mode="after")
        def _decodes(self) -> "SequenceLevelKD.Options":
            if self.beams > 1 and self.sampling_temperature > 0:
                raise ValueError("a beam search does not sample: set beams to 1, or sampling_temperature to 0")
            return self

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        self.read_student = TokenReader(student, data.example)
        self.teacher_texts = TeacherTexts(self.options, data)

    def step(self, batch: Batch) -> Iterator[Update]:
        written = self.teacher_texts(self.student, self.teacher, batch)
        labels = kept_labels(written, self.read_student.shift)
        yield Update("student", next_token_loss(self.read_student(written), labels), len(labels))
