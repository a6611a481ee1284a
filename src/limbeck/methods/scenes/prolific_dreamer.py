"""ProlificDreamer: variational score distillation (Wang et al., 2023)."""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.core.card import Card
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo, Update
from limbeck.core.options import OptionsBase
from limbeck.core.registry import register
from limbeck.core.teacher import Teacher
from limbeck.diffusion.denoiser import process_of
from limbeck.diffusion.noise_levels import draw_between
from limbeck.diffusion.predictions import Prediction
from limbeck.diffusion.score_distillation import FakeLoss, denoising_error, entropic, noise_residual
from limbeck.methods.scenes.camera_score import CameraScore
from limbeck.methods.scenes.scene_method import SceneMethod, Views
from limbeck.methods.scenes.scene_options import SceneOptions
from limbeck.methods.scenes.views import PoseInput, pose_numbers
from limbeck.rendering.images import ImageScene


@register
class ProlificDreamer(SceneMethod):
    r"""A scene is pushed from where its own pictures are likely to where the teacher's are, by two scores.

    .. math::

        \nabla_\theta L &= \mathbb{E}_{t, \epsilon, c}\; w(t)\, \bigl(\epsilon_{\text{teacher}}(x_t, t, y^c)
            - \epsilon_\phi(x_t, t, c, y)\bigr) \frac{\partial g(\theta, c)}{\partial \theta}, \qquad
            x_t = \alpha_t\, g(\theta, c) + \sigma_t \epsilon

        L_\phi &= \mathbb{E}\, \bigl\| \epsilon_\phi(\alpha_{t'} g + \sigma_{t'} \epsilon', t', c, y)
            - \epsilon' \bigr\|^2

    The teacher is guided, knows the view by its prompt, and is asked at fewer noisy times after a first phase. phi, the
    player `critic`, follows the pictures of all particles: it starts as a copy of the teacher, or of a second teacher
    where one is given (as a v-predicting model beside one that predicts noise; needed where the first is no network),
    and is told the camera, which is left out for a share of the pictures. Scenes may be particles: `scene-voxels` and
    its kin with `particles`, or `scene-images`.

    Of the paper's stages, the second is `sds` on a `scene-mesh` with shows: normals, consistency and laplacian, and the
    third this method with frozen: [vertices]. What is lacking: DMTet and turning the first stage's field into the mesh
    within a recipe (the mesh starts as a sphere), embeddings of shading modes, an occupancy grid, and a data reader
    that encodes view prompts (a source of one's own can hold `prompt_front` and so on). Fields look at random places
    along rays by the global stream, so accumulation is exact for them only in evaluation mode.
    """

    card = Card(
        slug="prolific-dreamer",
        title="ProlificDreamer: High-Fidelity and Diverse Text-to-3D Generation with Variational Score Distillation",
        arxiv="2305.16213",
        year=2023,
        family="scenes",
        task="scene",
        needs=("teacher", "student"),
        use="Scenes or images from a diffusion model at ordinary guidance, detailed, and several that differ.",
        tiny={"fov": [40.0, 50.0], "critic_updates": 2, "backdrops_from": 0, "late_from": 1, "ray_entropy": 0.0},
    )

    class Options(SceneOptions):
        """phi, and the paper's values of what scenes have in common."""

        guidance: float = Field(7.5, ge=0, le=1000, description="scale g of the teacher; 1 is conditional")
        late_time_high: float = Field(0.5, gt=0, le=1, description="largest share of the way to noise after phase one")
        entropy_weight: float = Field(
            0.0, ge=0, le=1, description="lambda of ESD: how much phi speaks without the camera; 0 is this method"
        )
        critic: Literal["copy", "low-rank"] = Field(
            "low-rank", description="phi: a whole network, or additions to the frozen weights that it starts from"
        )
        critic_rank: int = Field(4, ge=1, le=65536, description="of a low-rank phi")
        critic_alpha: float | None = Field(None, gt=0, le=1e6, description="of a low-rank phi; rank if absent")
        critic_layers: list[str] | None = Field(
            None, description="of a low-rank phi; attention's projections if absent, all layers where there are none"
        )
        critic_loss: FakeLoss = Field(
            "prediction", description="error of phi: in what it predicts, in noise or in data"
        )
        critic_updates: int = Field(1, ge=1, le=1000, description="K, updates of phi when it is its turn")
        critic_every: int = Field(1, ge=1, le=1000, description="K2, steps from one of its turns to the next")
        camera: PoseInput = Field(
            "pose", description="what phi is told: the pose, the projection to the image, or nothing"
        )
        camera_layer: str | None = Field(
            None, description="module of phi that embeds the time, to which the camera is added; found if absent"
        )
        camera_dropout: float = Field(0.1, ge=0, le=1, description="share of pictures whose camera phi is not told")

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        chosen, source = self.options, getattr(self._teachers[-1], "model", None)
        known = None if source is None else process_of(source)
        if source is None or known is None:
            raise IncompatibleError("the teacher is no network that phi could start from", "give such a one as second")
        told = chosen.camera != "none" and not isinstance(self.scene, ImageScene)
        rank = chosen.critic_rank if chosen.critic == "low-rank" else None
        shape = (rank, chosen.critic_alpha, chosen.critic_layers)
        self.critic = CameraScore(source, known, *shape, camera=told, camera_layer=chosen.camera_layer)

    def players(self) -> dict[str, nn.Module]:
        return {"student": self.student, "critic": self.critic}

    def residual(self, seen: Views, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        teacher = self.ask(x_t, t, seen.condition, self.options.guidance)
        return noise_residual(teacher, self.follower(seen, x_t, t))

    @torch.no_grad()
    def follower(self, seen: Views, x_t: Tensor, t: Tensor) -> Prediction:
        """What phi says, never guided by the prompt; with and without the camera as `entropy_weight` asks."""
        poses, weight = pose_numbers(seen.cameras, self.options.camera), self.options.entropy_weight
        if poses is None or weight == 0:
            return self.critic(x_t, t, seen.plain, poses, self.schedule)
        free = self.critic(x_t, t, seen.plain, torch.zeros_like(poses), self.schedule)
        return free if weight == 1 else entropic(self.critic(x_t, t, seen.plain, poses, self.schedule), free, weight)

    def follow(self, seen: Views) -> Iterator[Update]:
        if self.clock.step % self.options.critic_every:
            return
        for number in range(self.options.critic_updates):
            yield Update("critic", self.critic_loss(seen, str(number)), len(seen.x0))

    def critic_loss(self, seen: Views, key: str) -> Tensor:
        """Denoising error of phi on pictures without a graph, at all times of the schedule; a mean over views."""
        x0, draws, poses = seen.x0, seen.draws, pose_numbers(seen.cameras, self.options.camera)
        if poses is not None:
            told = draws.uniform(f"camera {key}") >= self.options.camera_dropout
            poses = poses * told[:, None]
        t = draw_between(draws.uniform(f"critic time {key}"), self.schedule)
        noise = draws.normal(f"critic noise {key}", x0)
        prediction = self.critic(self.schedule.add_noise(x0, noise, t), t, seen.plain, poses, self.schedule)
        return denoising_error(prediction, x0, noise, self.options.critic_loss).mean()
