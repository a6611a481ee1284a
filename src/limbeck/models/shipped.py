"""Building the shipped networks by name."""

from typing import Any

from torch import nn

from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo
from limbeck.models.cell import CellNet
from limbeck.models.configs import SHIPPED
from limbeck.models.convnet import ConvNet
from limbeck.models.denoising_mlp import DenoisingMLP
from limbeck.models.experts import Experts
from limbeck.models.mlp import MLP
from limbeck.models.names import check_arguments
from limbeck.models.scenes import GaussianScenes, HashScenes, ImageScenes, MeshScenes, VoxelScenes
from limbeck.models.stacked import StackedDenoiser
from limbeck.models.synthetic import SyntheticImages
from limbeck.models.vit import VisionTransformer

CLASSES: dict[str, type[nn.Module]] = {
    "cell": CellNet,
    "convnet": ConvNet,
    "denoiser": DenoisingMLP,
    "experts": Experts,
    "mlp": MLP,
    "scene-gaussians": GaussianScenes,
    "scene-hash": HashScenes,
    "scene-images": ImageScenes,
    "scene-mesh": MeshScenes,
    "scene-voxels": VoxelScenes,
    "stacked-denoiser": StackedDenoiser,
    "synthetic-set": SyntheticImages,
    "vit": VisionTransformer,
}
"""The class of each shipped network by its name in recipes."""


def build_shipped(name: str, arguments: dict[str, Any], data: DataInfo | None = None, key: str = "model") -> nn.Module:
    """A shipped network with fresh weights; what `arguments` leave open is read from the data.

    Raises:
        RecipeError: an argument is unknown, of the wrong type or out of range.
        IncompatibleError: the data hold no images, or the network takes only square ones.
    """
    defaults = {} if data is None else _defaults(name, arguments, data)
    complete = {**defaults, **arguments}
    check_arguments(name, complete, key)
    return CLASSES[name](**complete)


def shipped_name(model: nn.Module) -> str | None:
    """The name of a shipped network, None for any other model (subclasses included)."""
    return next((name for name in SHIPPED if type(model) is CLASSES[name]), None)


def _defaults(name: str, arguments: dict[str, Any], data: DataInfo) -> dict[str, Any]:
    if name.startswith("scene-") and name != "scene-images":
        return {}
    if "image" not in data.example:
        raise IncompatibleError(f"'{name}' takes images, and the data hold {', '.join(data.example)}")
    classes = {"classes": data.classes} if data.classes else {}
    if name in ("denoiser", "stacked-denoiser"):
        return {"numbers": data.example["image"][0].numel(), **classes}
    channels, height, width = data.example["image"].shape[1:]
    if name == "scene-images":
        return {"channels": channels, "height": height, "width": width}
    if name == "synthetic-set":
        return {"channels": channels, "height": height, "width": width, **classes}
    if name == "experts":
        return {"channels": channels, "height": height, "side": width, **classes}
    if name == "mlp":
        return {"inputs": channels * height * width, **classes}
    if name in ("cell", "convnet"):
        return {"channels": channels, **classes}
    if height != width:
        raise IncompatibleError(f"'vit' takes square images, not {height}x{width}", "set data.image_size")
    size = arguments.get("image_size", height)
    return {"image_size": size, "patch_size": _patch_size(size), "channels": channels, **classes}


def _patch_size(side: Any, most: int = 8) -> int:
    """The smallest patch that leaves at most `most` patches a side, but two pixels at least where that divides."""
    if not isinstance(side, int):
        return 1  # the check of the arguments will say what is wrong with the size
    fitting = [patch for patch in range(1, side + 1) if side % patch == 0 and side // patch <= most]
    return next((patch for patch in fitting if patch >= 2), 1)
