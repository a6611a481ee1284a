"""Progressive distillation: the steps of a sampler are halved until few are left (Salimans and Ho, 2022)."""

from pydantic import Field

from limbeck.core.card import Card
from limbeck.core.registry import register
from limbeck.data.noise import ItemNoise
from limbeck.methods.trajectory.halving_method import HalvingMethod, HalvingOptions


@register
class ProgressiveDistillation(HalvingMethod):
    r"""A student of N steps learns to land in one step where its teacher of 2N lands in two; then it teaches the next.

    .. math:: L = \mathbb{E}_{x_0, \epsilon, i}\; w(t)\, \bigl\| \hat x_\theta(z_t, t) - \tilde x \bigr\|^2, \qquad
        \tilde x = \frac{\sigma_t z_{t''} - \sigma_{t''} z_t}{\sigma_t \alpha_{t''} - \sigma_{t''} \alpha_t}

    where :math:`t, t''` are neighbours on the student's grid, and two DDIM steps of the teacher lead from :math:`z_t`
    by way of the time halfway to :math:`z_{t''}`. Then N is halved; all halvings happen in one training. The authors
    restart the learning rate at each, while the rate of a training here runs through: for restarts, make each halving a
    stage of the recipe, with `start_steps` and `end_steps` alike. An average of the weights (`train.ema`) should
    forget within a phase. Students should predict v or x0: with few steps, predictions of the noise say little.
    """

    card = Card(
        slug="progressive-distillation",
        title="Progressive Distillation for Fast Sampling of Diffusion Models",
        arxiv="2202.00512",
        year=2022,
        family="trajectory",
        task="generation",
        needs=("teacher", "student"),
        use="To bring a diffusion model that needs no guidance, or one fixed scale of it, down to a few steps.",
        tiny={"start_steps": 4, "end_steps": 2, "initialise": "none"},
    )

    class Options(HalvingOptions):
        """How far the steps are halved, and from which teacher."""

        guidance: float = Field(1.0, ge=0, le=100, description="scale g with which the first teacher is asked")

    def scale(self, draws: ItemNoise) -> float:
        return float(self.options.guidance)

    def sample_scale(self) -> float:
        return float(self.options.guidance)
