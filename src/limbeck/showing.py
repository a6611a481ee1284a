"""Pictures of what a run left: a scene once around, still and moving; a synthetic set, a row a class."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from limbeck.core.errors import IncompatibleError

if TYPE_CHECKING:
    from torch import Tensor

    from limbeck.rendering.scene import Scene
    from limbeck.synthesis.synthetic_set import SyntheticSet

SIDE = 96
"""Pixels of the pictures of scenes that can be rendered at any size."""


def show_scene(scene: "Scene", views: int, out: Path | None = None) -> "Tensor":
    """Renders a scene from so many cameras around each particle; of images, so many of them as they are.

    Args:
        scene: in any mode, which is put back.
        views: of each particle, or images in all.
        out: PNG to write, all pictures in rows; of scenes also an animation of the same name in GIF, the particles
            side by side.

    Returns:
        Pictures (items, channels, height, width) in [0, 1], particle by particle.

    Raises:
        IncompatibleError: they are no pictures but latents.
        MissingExtraError: Pillow is not installed, for the GIF.
    """
    import torch

    from limbeck.models.modes import evaluating
    from limbeck.models.normalisation import normalisation_of
    from limbeck.rendering.images import ImageScene
    from limbeck.rendering.particles import all_around, particle_count

    with evaluating(scene), torch.no_grad():
        pictures = all_around(scene, views, SIDE, SIDE).cpu()
    is_images = isinstance(scene, ImageScene)
    if is_images:
        pictures = pictures[:views]
    if pictures.shape[1] not in (1, 3):
        raise IncompatibleError(f"what the run left has {pictures.shape[1]} channels: latents cannot be shown")
    if isinstance(scene, ImageScene) and not scene.bounded:
        mean, std = (pictures.new_tensor(v).view(-1, 1, 1) for v in normalisation_of(scene) or ([0.5], [0.5]))
        pictures = (pictures * std + mean).clamp(0, 1)
    if out is None:
        return pictures
    from limbeck.core.durable import write_bytes
    from limbeck.report.pictures import grid, png
    from limbeck.report.turntable import write_gif

    write_bytes(out, png(grid(pictures, math.ceil(math.sqrt(len(pictures)))), longest=None))
    if not is_images:
        turns = pictures.unflatten(0, (particle_count(scene), -1))
        write_gif(torch.cat(list(turns), -1), out.with_suffix(".gif"))
    return pictures


def show_set(made: "SyntheticSet", items: int, out: Path | None = None) -> "Tensor":
    """The images of a synthetic set, class after class.

    Args:
        made: the set.
        items: how many images at most; each class shows as many as there is room for, and at least one.
        out: PNG to write, a row a class; nothing is written if absent.

    Returns:
        Images (items, channels, height, width) in [0, 1].

    Raises:
        IncompatibleError: it is not noted what the images are normalised with.
    """
    counts = made.hard_labels.bincount()
    each = max(1, min(items // max(int((counts > 0).sum()), 1), int(counts.max())))
    pictures = chosen_images(made, items, each)
    if out is not None:
        from limbeck.core.durable import write_bytes
        from limbeck.report.pictures import grid, png

        write_bytes(out, png(grid(pictures, each), longest=None))
    return pictures


def chosen_images(made: "SyntheticSet", classes: int, each: int) -> "Tensor":
    """The first images of the first classes of a set, in [0, 1]; a class of fewer images fills its row with white.

    Args:
        made: the set.
        classes: how many classes at most.
        each: images of a class.
    """
    import torch

    from limbeck.models.adapters.image_table import as_images

    images, labels, rows = as_images(made), made.hard_labels.cpu(), []
    each = min(each, int(labels.bincount().max()))
    for label in labels.unique()[:classes]:
        own = images[labels == label][:each]
        rows.append(torch.cat([own, own.new_ones(each - len(own), *own.shape[1:])]))
    return torch.cat(rows)
