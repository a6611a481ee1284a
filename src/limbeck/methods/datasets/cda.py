"""CDA: images recovered with crops that shrink, from the whole to details (Yin and Shen, 2023)."""

from pydantic import Field

from limbeck.core.card import Card
from limbeck.core.registry import register
from limbeck.methods.datasets.sre2l import SRe2L
from limbeck.synthesis.recovery import Curriculum, least_area


@register
class CurriculumDataSynthesis(SRe2L):
    r"""SRe2L whose crops begin as the whole image and may become ever smaller as recovery goes on.

    .. math:: l_i = f + (1 - f)\,\tfrac12 \Bigl(1 + \cos\frac{\pi\, i}{m I}\Bigr) \text{ for } i < m I,
        \qquad l_i = f \text{ from there on}

    is the least share of the image that the crops of step i of I show, f = `least_area` the last one; `linear` goes
    down evenly, and `step` is 1 until m I. With m = 0 this is SRe2L. Everything else is SRe2L's; the paper's settings:
    ImageNet-1K as there; Tiny ImageNet lr 0.4, statistics_weight 0.05, at 64 pixels; ImageNet-21K lr 0.05,
    statistics_weight 0.25, 2,000 steps, 20 images a class.
    """

    card = Card(
        slug="cda",
        title="Dataset Distillation via Curriculum Data Synthesis in Large Data Era",
        arxiv="2311.18838",
        year=2023,
        family="datasets",
        task="dataset",
        needs=("teacher", "student"),
        use="SRe2L's purpose with better images: global structure is settled before details are.",
        tiny={"jitter": 2},
    )

    class Options(SRe2L.Options):
        """SRe2L's, and the curriculum."""

        curriculum: Curriculum = Field("cosine", description="shape of the least area's way down")
        milestone: float = Field(1.0, ge=0, le=1, description="m, share of the steps that it takes; 0 is SRe2L")

    def least_area(self) -> float:
        options, clock = self.options, self.clock
        return least_area(options.curriculum, clock.step, clock.steps, options.milestone, options.least_area)
