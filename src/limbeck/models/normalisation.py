"""Which normalisation of its images a model was trained with."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

Normalisation = tuple[list[float], list[float]]
"""Mean and deviation of each channel, of images in [0, 1]."""

_ATTRIBUTE = "limbeck_normalisation"


def set_normalisation(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
    """Notes on a model what its images are normalised with; saved with the model and found by `normalisation_of`.

    Args:
        model: any model.
        mean: one number a channel, of images in [0, 1].
        std: one number above 0 a channel.
    """
    if len(mean) != len(std) or min(std) <= 0:
        raise ValueError("mean and std need one number a channel each, and deviations above 0")
    setattr(model, _ATTRIBUTE, ([float(value) for value in mean], [float(value) for value in std]))


def normalisation_of(model: nn.Module) -> Normalisation | None:
    """Per-channel (mean, deviation) that a model expects its images, given in [0, 1], to be normalised with.

    What was noted by `set_normalisation` comes first, then timm's `pretrained_cfg`, then the image processor's
    configuration in the folder that a transformers model came from; None where nothing is known.
    """
    noted = getattr(model, _ATTRIBUTE, None)
    if noted is not None:
        return noted
    settings = getattr(model, "pretrained_cfg", None)
    if isinstance(settings, dict) and settings.get("mean") and settings.get("std"):
        arguments: Any = getattr(model, "_model_args", {})
        channels = arguments.get("in_chans") or settings.get("input_size", (None,))[0]
        return _checked(settings["mean"], settings["std"], channels)
    return _of_processor(model)


def _of_processor(model: nn.Module) -> Normalisation | None:
    config: Any = getattr(model, "config", None)
    origin = getattr(config, "_name_or_path", "")
    path = Path(origin) / "preprocessor_config.json"
    if not origin or not path.is_file():
        return None
    try:
        settings = json.loads(path.read_bytes())
        if not settings.get("do_normalize", True):
            return None
        return _checked(settings["image_mean"], settings["image_std"], getattr(config, "num_channels", None))
    except (OSError, ValueError, KeyError, AttributeError):
        return None  # the file is advice from elsewhere: without it nothing is known


def _checked(mean: Any, std: Any, channels: int | None) -> Normalisation | None:
    if not len(mean) == len(std) == (channels or len(mean)):
        return None  # such as ImageNet's three numbers on a model built for gray images
    return [float(value) for value in mean], [float(value) for value in std]
