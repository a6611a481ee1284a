"""Pieces of recovering images from a classifier: crops whose least area follows a curriculum, groups, 8-bit storage."""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

Curriculum = Literal["cosine", "linear", "step"]
ATTEMPTS = 10  # as many as torchvision makes before it gives up on a random crop


def least_area(curriculum: Curriculum, step: int, steps: int, milestone: float = 1.0, final: float = 0.08) -> float:
    r"""Least share of the image's area that a crop of step `step` shows, from the whole image down to `final`.

    .. math:: l = f + (1 - f)\,\tfrac12\Bigl(1 + \cos\frac{\pi\, i}{m I}\Bigr) \text{ (cosine)}, \qquad
        l = f + (1 - f)\Bigl(1 - \frac{i}{m I}\Bigr) \text{ (linear)}, \qquad l = 1 \text{ (step)}

    while the step i is below m I, and f from there on.

    Args:
        curriculum: shape of the way down.
        step: i, from 0.
        steps: I, all steps, at least 1.
        milestone: m in [0, 1], share of the steps that the way takes; 0 is no curriculum.
        final: f in (0, 1].

    Source: CDA, arXiv 2311.18838 (2023).
    """
    if step >= milestone * steps:
        return final
    share = step / (milestone * steps)
    if curriculum == "cosine":
        return final + (1 - final) * (1 + math.cos(math.pi * share)) / 2
    return final + (1 - final) * (1 - share) if curriculum == "linear" else 1.0


class Window(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int


def draw_window(
    height: int, width: int, area: tuple[float, float], ratio: tuple[float, float], draws: torch.Generator
) -> Window:
    """A random rectangle of an image, drawn as torchvision's RandomResizedCrop does.

    Area uniform between two shares of the image's, width to height log-uniform between two ratios, position uniform;
    after ten rectangles that do not fit the largest central one within the ratios.

    Args:
        height: of the image, pixels.
        width: of the image, pixels.
        area: least and largest share in (0, 1].
        ratio: least and largest width to height, above 0.
        draws: a generator on the CPU.
    """

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=draws))

    for _ in range(ATTEMPTS):
        pixels = height * width * uniform(*area)
        aspect = math.exp(uniform(math.log(ratio[0]), math.log(ratio[1])))
        wide, tall = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < wide <= width and 0 < tall <= height:
            top, left = int(uniform(0.0, height - tall + 1.0)), int(uniform(0.0, width - wide + 1.0))
            return Window(top, left, tall, wide)
    aspect = min(max(width / height, ratio[0]), ratio[1])
    tall, wide = min(height, round(width / aspect)), min(width, round(height * aspect))
    return Window((height - tall) // 2, (width - wide) // 2, tall, wide)


class SharedView(NamedTuple):
    """What all images of a batch go through alike: a crop, a mirror, a cyclic shift by (down, right) pixels."""

    window: Window
    flip: bool
    roll: tuple[int, int]


def draw_view(
    size: tuple[int, int],
    area: tuple[float, float],
    draws: torch.Generator,
    *,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    jitter: int = 32,
) -> SharedView:
    """One view for a whole batch.

    Args:
        size: height and width of the images, pixels.
        area: least and largest share of the area that the crop shows.
        draws: a generator on the CPU.
        ratio: least and largest width to height of the crop.
        flip: probability of the mirror.
        jitter: largest shift, pixels; each of the two is uniform in {0, ..., jitter}.
    """
    window = draw_window(*size, area, ratio, draws)
    mirrored = bool(torch.rand((), generator=draws) < flip)
    down, right = torch.randint(jitter + 1, (2,), generator=draws).tolist()
    return SharedView(window, mirrored, (down, right))


def apply_view(
    images: Float[Tensor, "items channels height width"], view: SharedView
) -> Float[Tensor, "items channels height width"]:
    """Images cropped and resized to their own size (bilinear), mirrored, and shifted; gradients flow back.

    Args:
        images: any range.
        view: what to do with all of them.
    """
    top, left, tall, wide = view.window
    size = images.shape[2:]
    shown = images[:, :, top : top + tall, left : left + wide]
    if shown.shape != images.shape:
        shown = functional.interpolate(shown, size, mode="bilinear", align_corners=False)
    shown = shown.flip(-1) if view.flip else shown
    return torch.roll(shown, view.roll, (2, 3))


def groups_of(labels: Int64[Tensor, " items"], most: int = 100) -> list[Int64[Tensor, " group"]]:
    """Items that are recovered together: the first of each class, then the second of each, cut into groups of `most`.

    A group holds no class twice, so that its statistics are those of data in which classes are equally frequent.

    Args:
        labels: class of each item.
        most: classes a group, at least 1.

    Returns:
        Rows of the items, each in one group; sorted by class within it.
    """
    seen: dict[int, int] = {}
    rounds: dict[int, list[tuple[int, int]]] = {}
    for row, label in enumerate(labels.tolist()):
        seen[label] = seen.get(label, -1) + 1
        rounds.setdefault(seen[label], []).append((label, row))
    found = []
    for number in sorted(rounds):
        rows = [row for _, row in sorted(rounds[number])]
        found += [torch.tensor(rows[start : start + most]) for start in range(0, len(rows), most)]
    return found


def with_gradient(value: Float[Tensor, ""], inputs: Tensor, gradient: Tensor) -> Float[Tensor, ""]:
    """A scalar that equals `value` and whose gradient with respect to `inputs` is `gradient`.

    So a loss that was differentiated piece by piece, each piece's graph freed at once, is handed on whole.

    Args:
        value: what the scalar equals.
        inputs: what the gradient flows to.
        gradient: in the shape of `inputs`.
    """
    return value.detach() + ((inputs - inputs.detach()) * gradient.detach()).sum()


def to_bytes(
    images: Float[Tensor, "items channels height width"],
    mean: Float[Tensor, " channels"],
    std: Float[Tensor, " channels"],
) -> Tensor:
    """Normalised images as they are stored: uint8 (items, channels, height, width), rounded, cut to [0, 255].

    Args:
        images: (x - mean) / std of images x in [0, 1].
        mean: of each channel.
        std: of each channel, above 0.
    """
    pixels = images * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8)


def from_bytes(images: Tensor, mean: Float[Tensor, " channels"], std: Float[Tensor, " channels"]) -> Tensor:
    """Stored images (items, channels, height, width), uint8, normalised again: what whoever reads them trains on.

    Args:
        images: as from `to_bytes`.
        mean: of each channel.
        std: of each channel, above 0.
    """
    return (images.to(mean.dtype) / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
