"""A scene seen all around, as an animated GIF."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.core.durable import write_bytes
from limbeck.core.errors import MissingExtraError

if TYPE_CHECKING:
    from torch import Tensor


def write_gif(frames: "Tensor", path: Path, seconds: float = 3.0) -> None:
    """Writes frames (frames, 3, height, width) in [0, 1] as an endless animation of about `seconds` a turn."""
    pictures = [_picture(frame) for frame in frames]
    content = io.BytesIO()
    # GIF counts in hundredths of a second, and viewers slow down below two of them.
    each = max(20, 10 * round(100 * seconds / len(pictures)))
    rest: dict[str, Any] = {"save_all": True, "append_images": pictures[1:], "duration": each, "loop": 0}
    pictures[0].save(content, format="GIF", optimize=False, **rest)
    write_bytes(path, content.getvalue())


def _picture(image: "Tensor") -> Any:
    """One image (3, height, width) in [0, 1] as Pillow's."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "scenes", "a turntable") from error
    return Image.fromarray((image.detach().cpu().float() * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())
