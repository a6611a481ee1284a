"""Classifier score distillation (Yu et al., 2023): guidance alone."""

import torch
from torch import Tensor

from limbeck.core.card import Card
from limbeck.core.errors import IncompatibleError
from limbeck.core.registry import register
from limbeck.methods.scenes.scene_method import SceneMethod, Views


@register
class ClassifierScoreDistillation(SceneMethod):
    r"""A scene is pushed to where the teacher finds the condition most plausible, whatever else it finds.

    .. math:: \nabla_\theta L = \mathbb{E}_{t, \epsilon, c}\; w(t)\,
        \bigl(\epsilon_{\text{teacher}}(x_t, t, y^c) - \epsilon_{\text{teacher}}(x_t, t, \varnothing)\bigr)
        \frac{\partial g(\theta, c)}{\partial \theta}

    The limit of `sds` at an infinite guidance. `guidance` counts for nothing, and the paper's negative prompts, whose
    weight falls in training, are lacking.
    """

    card = Card(
        slug="csd",
        title="Text-to-3D with Classifier Score Distillation",
        arxiv="2310.19415",
        year=2023,
        family="scenes",
        task="scene",
        needs=("teacher", "student", "labels"),
        use="Where the scene should show the condition as clearly as it can, at the price of strong colours.",
        tiny={"backdrops_from": 0, "late_from": 1, "late_time_high": 0.5, "ray_entropy": 0.0},
    )

    @torch.no_grad()
    def residual(self, seen: Views, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        teacher, asked = self.teacher_denoiser, seen.condition
        if not asked:
            raise IncompatibleError("there is no condition to be plausible", "take data with labels or prompts")
        null = teacher.null(asked)
        both = {name: torch.cat([asked[name], null[name]]) for name in asked}
        with_it, without = teacher(torch.cat([x_t, x_t]), t.repeat(2), both).eps.chunk(2)
        return with_it - without
