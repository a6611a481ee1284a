"""Several scenes of one kind: draws from a distribution of scenes, each seen by cameras of its own."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from limbeck.rendering.cameras import Cameras, turntable
from limbeck.rendering.images import ImageScene
from limbeck.rendering.scene import Background, Light, RenderOutput, Scene


class Particles(Scene):
    """One scene or several that share nothing; rendered as a scene, it shows the first.

    Args:
        scenes: at least one.
        elevation: degrees above the horizon, of the cameras that show the scenes once they are done.
        distance: of these cameras from the origin, world units.
        fov: of these cameras, vertical, degrees.
    """

    def __init__(
        self, scenes: Sequence[Scene], elevation: float = 17.5, distance: float = 1.25, fov: float = 55.0
    ) -> None:
        super().__init__()
        if not scenes:
            raise ValueError("there are no particles without a scene")
        self.scenes = nn.ModuleList(scenes)
        self.viewpoint = (elevation, distance, fov)

    def render(
        self,
        cameras: Cameras,
        background: Background = None,
        light: Light | None = None,
        time: Tensor | float | None = None,
        aux: Collection[str] = (),
    ) -> RenderOutput:
        """See `Scene.render`; of the first scene."""
        first: Scene = particles_of(self)[0]
        return first.render(cameras, background, light, time, aux)


@dataclass(frozen=True)
class Backdrops:
    """Solid colours behind some of the views, in place of the scene's own background.

    Attributes:
        colours: in [0, 1].
        chosen: which views get theirs.
    """

    colours: Float[Tensor, "views 3"]
    chosen: Bool[Tensor, " views"]

    def images(self, scene: Scene, cameras: Cameras, views: Tensor | slice) -> Float[Tensor, "views 3 height width"]:
        """What is behind a scene for the cameras of these views."""
        nothing = self.colours.new_zeros(len(cameras), 3, cameras.height, cameras.width)
        own = scene.over_background(nothing, cameras, nothing[:, :1], None)
        return torch.where(self.chosen[views, None, None, None], self.colours[views][..., None, None].to(own), own)


def particles_of(scene: Scene) -> list[Scene]:
    """The scenes that a scene consists of, itself where it is no `Particles`."""
    return [part for part in scene.scenes if isinstance(part, Scene)] if isinstance(scene, Particles) else [scene]


def particle_count(scene: Scene) -> int:
    """How many particles there are; each image of an `ImageScene` is one."""
    return len(scene.values) if isinstance(scene, ImageScene) else len(particles_of(scene))


def look(
    scene: Scene,
    which: Int[Tensor, " views"],
    cameras: Cameras | None,
    backdrops: Backdrops | None = None,
    aux: Collection[str] = (),
) -> RenderOutput:
    """Renders each view of the particle that it is of.

    Args:
        scene: one scene, or `Particles`, or an `ImageScene`, whose images are shown without cameras.
        which: the particle of each view.
        cameras: one a view.
        backdrops: colours behind the views; the scenes' own backgrounds if absent.
        aux: see `Scene.render`.

    Particles that no view is of get no gradient. With several, the host waits for the device once a particle.
    """
    if isinstance(scene, ImageScene):
        return scene.render(which, aux=aux)
    assert cameras is not None
    parts = particles_of(scene)
    if len(parts) == 1:
        behind = None if backdrops is None else backdrops.images(parts[0], cameras, slice(None))
        return parts[0].render(cameras, behind, aux=aux)
    rows, seen = [], []
    for number, part in enumerate(parts):
        views = (which == number).nonzero()[:, 0]
        if len(views):
            mine = cameras[views]
            behind = None if backdrops is None else backdrops.images(part, mine, views)
            rows.append(views)
            seen.append(part.render(mine, behind, aux=aux))
    order = torch.cat(rows).argsort()

    def joined(values: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(values))[order]

    normals = [one.normals for one in seen if one.normals is not None]
    return RenderOutput(
        joined([one.image for one in seen]),
        joined([one.depth for one in seen]),
        joined([one.opacity for one in seen]),
        joined(normals) if normals else None,
        {name: joined([one.aux[name] for one in seen]) for name in seen[0].aux},
    )


def shown_from(scene: Scene, views: int, height: int, width: int) -> Cameras:
    """The cameras of a turntable at a scene's own viewpoint; that of `Particles` by default."""
    elevation, distance, fov = getattr(scene, "viewpoint", (17.5, 1.25, 55.0))
    return turntable(views, height, width, elevation, distance, fov)


def all_around(scene: Scene, views: int, height: int, width: int) -> Float[Tensor, "views channels height width"]:
    """Pictures of every particle in turn, each once around (`views` of it); an `ImageScene`'s images, once each."""
    if isinstance(scene, ImageScene):
        return scene.render().image
    weight = next(scene.parameters())
    cameras = shown_from(scene, views, height, width).to(weight.device).to(weight.dtype)
    return torch.cat([part.render(cameras).image for part in particles_of(scene)])


def as_pictures(
    image: Float[Tensor, "views channels height width"], channels: int, mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "views out height width"]:
    """Renderings in [0, 1] as a network sees pictures: in its channels (gray is the mean colour), and normalised.

    Raises:
        ValueError: the channels do not go together.
    """
    if image.shape[1] != channels and 1 not in (channels, image.shape[1]):
        raise ValueError(f"renderings of {image.shape[1]} channels cannot become pictures of {channels}")
    if channels == 1:
        image = image.mean(1, keepdim=True)
    shift, scale = (image.new_tensor(list(values)).view(-1, 1, 1) for values in (mean, std))
    return (image.expand(-1, channels, -1, -1) - shift) / scale
