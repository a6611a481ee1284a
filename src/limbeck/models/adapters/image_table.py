"""Synthetic sets as parquet files that `datasets` loads, with pictures by Pillow and tables by pyarrow."""

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.core.durable import write_bytes
from limbeck.core.errors import IncompatibleError, MissingExtraError
from limbeck.models.normalisation import normalisation_of
from limbeck.synthesis.synthetic_set import SyntheticSet


def as_images(made: SyntheticSet) -> Tensor:
    """The images (items, channels, height, width) of a set in [0, 1], clipped to it, on the CPU.

    Raises:
        IncompatibleError: it is not noted what the images are normalised with.
    """
    if made.whitening is not None:
        return made.whitening.invert(made.images.detach()).cpu().clamp(0, 1)
    known = normalisation_of(made)
    if known is None:
        raise IncompatibleError("it is not noted what the set's images are normalised with", "take a run's result")
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in known)
    return (made.images.detach().cpu().float() * std + mean).clamp(0, 1)


def write_table(made: SyntheticSet, path: Path) -> None:
    """Writes a set as one parquet file with the columns `image` (PNG), `label` and, of soft labels, `probabilities`.

    Pictures have eight bits a channel and no values outside [0, 1]: the exact numbers are those that `save_model`
    keeps.

    Args:
        made: a set of gray or coloured images.
        path: file to write, in an existing folder.

    Raises:
        IncompatibleError: images with other than one or three channels, or of unknown normalisation.
        MissingExtraError: pyarrow or Pillow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "language", "the parquet format") from error
    if made.images.shape[1] not in (1, 3):
        raise IncompatibleError(f"images of {made.images.shape[1]} channels are no pictures")
    labels = made.hard_labels.cpu().tolist()
    columns: dict[str, Any] = {
        "image": [{"bytes": _png(image), "path": f"{n:06d}.png"} for n, image in enumerate(as_images(made))],
        "label": labels,
    }
    classes = int(made.labels.shape[1]) if made.soft else max(labels) + 1
    names = [str(number) for number in range(classes)]
    features: dict[str, Any] = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    picture = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    kinds = [("image", picture), ("label", pyarrow.int64())]
    if made.soft:
        columns["probabilities"] = made.labels.cpu().float().tolist()
        features["probabilities"] = {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "Sequence"}
        kinds.append(("probabilities", pyarrow.list_(pyarrow.float32())))
    noted = {"huggingface": json.dumps({"info": {"features": features}})}
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns, schema=pyarrow.schema(kinds, metadata=noted)), content)
    write_bytes(path, content.getvalue())


def _png(image: Tensor) -> bytes:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "vision", "pictures in parquet files") from error
    pixels = (image * 255).round().byte().permute(1, 2, 0).squeeze(2).numpy()
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG")
    return content.getvalue()
