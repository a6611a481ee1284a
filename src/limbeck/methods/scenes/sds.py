"""Score distillation sampling (Poole et al., 2022): the baseline of all that fit scenes to diffusion models."""

from torch import Tensor

from limbeck.core.card import Card
from limbeck.core.registry import register
from limbeck.diffusion.score_distillation import noise_residual
from limbeck.methods.scenes.scene_method import SceneMethod, Views


@register
class ScoreDistillation(SceneMethod):
    r"""A scene is pushed to where the teacher finds its noised pictures most likely.

    .. math:: \nabla_\theta L = \mathbb{E}_{t, \epsilon, c}\; w(t)\,
        \bigl(\epsilon_{\text{teacher}}(x_t, t, y^c) - \epsilon\bigr) \frac{\partial g(\theta, c)}{\partial \theta}

    It seeks a mode: many particles end in few places, over-smooth, and need a guidance of about 100. Shading by a
    random lamp is lacking.
    """

    card = Card(
        slug="sds",
        title="DreamFusion: Text-to-3D using 2D Diffusion",
        arxiv="2209.14988",
        year=2022,
        family="scenes",
        task="scene",
        needs=("teacher", "student"),
        use="The simplest way to a scene from a diffusion model, and the baseline of the others.",
        tiny={"backdrops_from": 0, "late_from": 1, "late_time_high": 0.5, "ray_entropy": 0.0},
    )

    def residual(self, seen: Views, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return noise_residual(self.ask(x_t, t, seen.condition, self.options.guidance), noise)
