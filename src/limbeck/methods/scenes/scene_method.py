"""Parent of the methods that fit scenes to what a diffusion model expects of their pictures."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo, Update
from limbeck.core.options import OptionsBase
from limbeck.core.teacher import Ensemble, Teacher
from limbeck.data.noise import ItemNoise
from limbeck.diffusion.decoding import encoder_of
from limbeck.diffusion.denoiser import Condition, condition_of
from limbeck.diffusion.noise_levels import draw_between
from limbeck.diffusion.schedules import Schedule, along
from limbeck.diffusion.score_distillation import inject_gradient, time_weight
from limbeck.methods.scenes.scene_options import SceneOptions
from limbeck.methods.scenes.views import draw_backdrops, draw_cameras, label_of_view, prompt_of_view, view_shares
from limbeck.methods.trajectory.diffusion_method import DiffusionMethod
from limbeck.models.describe import normalisation_of
from limbeck.rendering.cameras import CameraRanges, Cameras
from limbeck.rendering.images import ImageScene
from limbeck.rendering.meshes import MeshScene, laplacian, normal_consistency
from limbeck.rendering.particles import as_pictures, look, particle_count, particles_of
from limbeck.rendering.regularisers import half_opacity, ray_entropy, sparsity
from limbeck.rendering.scene import RenderOutput, Scene


@dataclass(frozen=True)
class Views:
    """What one step looks at.

    Attributes:
        x0: pictures as the teacher sees them (views, ...), with the scene's graph.
        condition: what the teacher is told of each view.
        plain: the condition without the view.
        cameras: one a view; None for images that are their own renderings.
        draws: random numbers of the views.
        output: the rendering.
    """

    x0: Tensor
    condition: Condition
    plain: Condition
    cameras: Cameras | None
    draws: ItemNoise
    output: RenderOutput


class SceneMethod(DiffusionMethod):
    """A scene whose pictures are pushed along w(t) times a residual that a subclass gives.

    Each item of a batch is one view: a camera, a background, a particle, a time and noise, all functions of the step's
    seed and the item's number. Of the data the method uses labels or prompts, and the images' shape.
    """

    class Options(SceneOptions):
        """What methods on scenes have in common."""

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        # Two teachers are two models and no ensemble of logits: the first is matched; the other, see `ProlificDreamer`.
        self._teachers = teacher.teachers if isinstance(teacher, Ensemble) else [teacher]
        if any(getattr(one, "adapt", None) is not None for one in self._teachers):
            raise IncompatibleError("teachers expect different pictures", "set data.mean and data.std to theirs")
        if not isinstance(student, Scene):
            raise IncompatibleError(f"a {type(student).__name__} is no scene", "take a student such as scene-voxels")
        if self.options.time_low >= min(self.options.time_high, self.options.late_time_high):
            raise IncompatibleError("time_low is not below time_high", "exchange them")
        if self.options.labels and not data.classes:
            raise IncompatibleError("the data have no classes, and labels asks for one")
        if len(self.options.labels) == 2:
            raise IncompatibleError("labels names two classes", "give one, or those of front, side and back")
        self._check_scene(data)

    @property
    def scene(self) -> Scene:
        """The student."""
        assert isinstance(self.student, Scene)
        return self.student

    def note_student(self) -> None:
        """Nothing: a scene does not denoise."""

    def _check_scene(self, data: DataInfo) -> None:
        """Refuses options that the scene cannot follow."""
        options, parts = self.options, particles_of(self.scene)
        try:
            self.ranges = CameraRanges(options.azimuth, options.elevation, options.distance, options.fov)
        except ValueError as error:
            raise IncompatibleError(str(error), "correct the range of the cameras") from error
        if options.ray_entropy and not all("weights" in part.offers for part in parts):
            raise IncompatibleError("only radiance fields have an entropy along rays", "leave ray_entropy out")
        if (options.consistency or options.laplacian) and not all(isinstance(part, MeshScene) for part in parts):
            raise IncompatibleError("only meshes have bends and vertices", "leave consistency and laplacian out")
        if options.shows == "normals" and not all("normals" in part.offers for part in parts):
            raise IncompatibleError("the scene has no normals", "set shows: colour")
        for name in options.frozen:
            kept = [value for key, value in self.scene.named_parameters() if name in key]
            if not kept:
                raise IncompatibleError(f"the scene has no parameter '{name}'", "correct frozen")
            for value in kept:
                value.requires_grad_(False)
        if not isinstance(self.scene, ImageScene) and data.example["image"].ndim != 4:
            raise IncompatibleError("the data hold no images to take the size of the renderings from")

    def _teacher_model(self) -> nn.Module:
        model = getattr(self._teachers[0], "model", None)
        if model is None:
            raise IncompatibleError("this method needs a live teacher, a diffusion model that it can ask")
        return model

    @property
    def schedule(self) -> Schedule:
        """The teacher's."""
        return self.teacher_denoiser.schedule

    def step(self, batch: Batch) -> Iterator[Update]:
        seen = self.look(batch)
        loss, logs = self.student_loss(seen)
        yield Update("student", loss, batch.size, logs)
        yield from self.follow(replace(seen, x0=seen.x0.detach()))

    def follow(self, seen: Views) -> Iterator[Update]:
        """Updates of further players, on pictures without their graph; none here."""
        return iter(())

    def residual(self, seen: Views, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the pictures are pushed against (views, ...), at x_t; without a graph."""
        raise NotImplementedError

    def student_loss(self, seen: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """The push on the pictures and what keeps the scene tidy, a mean over views; and what to record."""
        options, schedule = self.options, self.schedule
        high = options.time_high if self.clock.step < options.late_from else options.late_time_high
        t = draw_between(seen.draws.uniform("time"), schedule, options.time_low, high)
        noise = seen.draws.normal("noise", seen.x0)
        with torch.no_grad():
            x_t = schedule.add_noise(seen.x0, noise, t)
            residual = self.residual(seen, x_t, t, noise)
            push = along(time_weight(options.weight, t, schedule), x_t) * residual
            push = push if options.clip is None else push.clamp(-options.clip, options.clip)
        matching = inject_gradient(seen.x0, push, options.reduction)
        size = residual.float().flatten(1).norm(dim=1).mean()
        return matching + self.tidiness(seen.output), {"matching": matching, "residual": size}

    def tidiness(self, output: RenderOutput) -> Tensor:
        """The weighted sum of what keeps fields from fog and meshes even, a mean over views."""
        options, total = self.options, output.opacity.new_zeros(())
        if "weights" in output.aux:
            weight = 10.0 if options.ray_entropy is None else options.ray_entropy
            total = total + weight * ray_entropy(output.aux["weights"]).mean()
        if options.sparsity:
            total = total + options.sparsity * sparsity(output.opacity).mean()
        if options.opaque and self.clock.step >= options.opaque_from:
            total = total + options.opaque * half_opacity(output.opacity).mean()
        for part in particles_of(self.scene):
            if isinstance(part, MeshScene) and (options.consistency or options.laplacian):
                total = total + options.consistency * normal_consistency(part.vertices, part.faces)
                total = total + options.laplacian * laplacian(part.vertices, part.faces)
        return total

    def look(self, batch: Batch) -> Views:
        """Renders a view for each item, and says what is asked for in it."""
        draws, options, count = self.draws(batch), self.options, particle_count(self.scene)
        which = draws.items % count if options.choice == "in turn" else draws.integers("particle", count)
        cameras = None
        if not isinstance(self.scene, ImageScene):
            weight = next(self.scene.parameters())
            size = self._side(options.first_size if self.clock.step < options.late_from else None)
            cameras = draw_cameras(draws, self.ranges, *size).to(weight.device).to(weight.dtype)
        output = self._render(which, cameras, draws)
        plain = self.read(batch)[1]
        return Views(self._pictures(output), self._of_view(batch, plain, cameras), plain, cameras, draws, output)

    def read(self, batch: Batch) -> tuple[Tensor, Condition]:
        """The items' images, of which nothing is used, and what is asked for whatever the view."""
        null = getattr(getattr(self.teacher_denoiser, "process", None), "null_label", -1)
        condition = dict(condition_of(batch, null))
        if not self.data.classes:
            condition.pop("label", None)
        labels = self.options.labels
        if labels:
            condition["label"] = torch.full_like(batch["label"], labels[0])
        return batch["image"], condition if len(labels) < 3 else self.teacher_denoiser.null(condition)

    def _of_view(self, batch: Batch, plain: Condition, cameras: Cameras | None) -> Condition:
        """What the teacher is told of each view."""
        options = self.options
        if cameras is None or (options.view_prompts == "none" and len(options.labels) < 3):
            return plain
        if len(options.labels) >= 3:
            label = label_of_view(options.labels, view_shares(cameras, "named"))
            return {**plain, "label": label}
        return prompt_of_view(batch, plain, view_shares(cameras, options.view_prompts))

    def _render(self, which: Tensor, cameras: Cameras | None, draws: ItemNoise) -> RenderOutput:
        options = self.options
        backdrops = None
        if options.backdrops and self.clock.step >= options.backdrops_from:
            backdrops = draw_backdrops(draws, options.backdrops)
        aux = {"normals"} if options.shows == "normals" else set()
        if options.ray_entropy != 0 and all("weights" in part.offers for part in particles_of(self.scene)):
            aux.add("weights")
        with torch.autocast(which.device.type, enabled=False):  # scenes are float32, whatever networks run in
            return look(self.scene, which, cameras, backdrops, aux)

    def _side(self, side: int | None) -> tuple[int, int]:
        side = side or self.options.size
        height, width = self.data.example["image"].shape[-2:]
        return (side, side) if side else (height, width)

    def _pictures(self, output: RenderOutput) -> Tensor:
        """Renderings as the teacher sees pictures: in its channels and size, normalised, or as latents."""
        if isinstance(self.scene, ImageScene) and not self.scene.bounded:
            return output.image
        image, model = output.image, self._teacher_model()
        if self.options.shows == "normals":
            assert output.normals is not None
            image = output.opacity * (output.normals + 1) / 2
        encode = encoder_of(model)
        if encode is not None:
            side = self._side(None)
            image = image if image.shape[-2:] == side else functional.interpolate(image, side, mode="bilinear")
            return encode(2 * image - 1)
        channels, *size = self.data.example["image"].shape[1:]
        if list(image.shape[-2:]) != size:
            image = functional.interpolate(image, size, mode="bilinear", antialias=True)
        try:
            return as_pictures(image, channels, *(normalisation_of(model) or ([0.5] * channels, [0.5] * channels)))
        except ValueError as error:
            raise IncompatibleError(str(error), "note the encoder on the teacher: diffusion.decoding") from error
