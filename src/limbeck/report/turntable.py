"""A scene seen all around: an animated GIF, and a PNG with every frame."""

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.core.durable import write_bytes
from limbeck.core.errors import MissingExtraError

if TYPE_CHECKING:
    from torch import Tensor

    from limbeck.rendering.cameras import Cameras
    from limbeck.rendering.scene import Scene


def write_turntable(scene: "Scene", cameras: "Cameras", folder: Path, name: str = "turntable") -> list[Path]:
    """Renders a scene once from each camera, one at a time, and writes NAME.gif and NAME.png into an existing folder.

    Args:
        scene: rendered in evaluation mode, whose training mode is then put back.
        cameras: one a frame, e.g. `limbeck.rendering.cameras.turntable(36, 128, 128)`.
        folder: where to write.
        name: of the files, without ending.

    Raises:
        MissingExtraError: Pillow is not installed.
    """
    import torch

    training = scene.training
    scene.eval()
    try:
        with torch.no_grad():
            frames = torch.cat([scene(cameras[slice(n, n + 1)]).image.cpu() for n in range(len(cameras))])
    finally:
        scene.train(training)
    animation, sheet = folder / f"{name}.gif", folder / f"{name}.png"
    write_gif(frames, animation)
    write_sheet(frames, sheet)
    return [animation, sheet]


def write_gif(frames: "Tensor", path: Path, seconds: float = 3.0) -> None:
    """Writes frames (frames, 3, height, width) in [0, 1] as an endless animation of about `seconds` a turn."""
    pictures = [_picture(frame) for frame in frames]
    content = io.BytesIO()
    # GIF counts in hundredths of a second, and viewers slow down below two of them.
    each = max(20, 10 * round(100 * seconds / len(pictures)))
    rest: dict[str, Any] = {"save_all": True, "append_images": pictures[1:], "duration": each, "loop": 0}
    pictures[0].save(content, format="GIF", optimize=False, **rest)
    write_bytes(path, content.getvalue())


def write_sheet(frames: "Tensor", path: Path, columns: int | None = None) -> None:
    """Writes frames (frames, 3, height, width) in [0, 1] side by side, about as many rows as columns unless given."""
    count, _, height, width = frames.shape
    columns = columns or math.ceil(math.sqrt(count))
    sheet = frames.new_ones(3, math.ceil(count / columns) * height, columns * width)
    for number, frame in enumerate(frames):
        top, left = number // columns * height, number % columns * width
        sheet[:, top : top + height, left : left + width] = frame
    content = io.BytesIO()
    _picture(sheet).save(content, format="PNG")
    write_bytes(path, content.getvalue())


def _picture(image: "Tensor") -> Any:
    """One image (3, height, width) in [0, 1] as Pillow's."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "scenes", "a turntable") from error
    return Image.fromarray((image.detach().cpu().float() * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())
