"""What can be said of a model: its layers, its size, its cost and its speed."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.call import call
from limbeck.core.errors import IncompatibleError
from limbeck.diffusion.denoiser import NetworkDenoiser, condition_of, process_of
from limbeck.models.modes import device_of, evaluating
from limbeck.models.normalisation import normalisation_of, set_normalisation
from limbeck.rendering.particles import look, particle_count, shown_from
from limbeck.rendering.scene import Scene
from limbeck.synthesis.synthetic_set import SyntheticSet

__all__ = ["count_flops", "count_parameters", "default_layers", "latency", "normalisation_of", "set_normalisation"]


def default_layers(model: nn.Module) -> list[str]:
    """Module paths of a model's stages from input to output, for tapping features.

    Shipped networks say so themselves, timm's list their stages or blocks, and of any other model (transformers'
    encoders, say) it is the children of that list of layers which holds the most parameters.

    Raises:
        IncompatibleError: the model has no such list; name the layers by hand.
    """
    layers = getattr(model, "layers", None)
    if callable(layers) and not isinstance(layers, nn.Module):
        return layers()
    stages = _timm_stages(model) or _largest_list(model)
    if not stages:
        raise IncompatibleError(
            f"{type(model).__name__} has no list of stages", "name the layers in the method's options"
        )
    return stages


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, shared ones once, frozen ones included."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(model: nn.Module, batch: Batch) -> float:
    """Floating-point operations of one forward pass per item; a multiplication with its addition counts as two.

    Only matrix products, convolutions and attention are counted, as by `torch.utils.flop_counter`.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with evaluating(model), FlopCounterMode(display=False) as counter:
        run_once(model, batch.to(device_of(model)))
    return counter.get_total_flops() / batch.size


def latency(model: nn.Module, batch: Batch, repeats: int = 20) -> float:
    """Median seconds an item over `repeats` forward passes in eval mode, after two that are not counted."""
    device = device_of(model)
    batch = batch.to(device)

    def run() -> None:
        run_once(model, batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with evaluating(model):
        return median_seconds(run, repeats) / batch.size


def median_seconds(run: Callable[[], Any], repeats: int = 20) -> float:
    """Median seconds of a call over `repeats` of them, after two that are not counted."""
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def run_once(model: nn.Module, batch: Batch) -> Any:
    """One forward pass: of a classifier or language model on the batch, of a denoiser on it taken as pure noise; of a
    scene one view an item, of the size of the batch's images; a synthetic set computes nothing.
    """
    if isinstance(model, Scene):
        return _one_view_an_item(model, batch)
    if isinstance(model, SyntheticSet):
        return model.images
    process = process_of(model)
    if process is None:
        return call(model, batch)
    x = batch["image"]
    t = x.new_full((len(x),), process.schedule.t_max, dtype=torch.float64)
    return NetworkDenoiser(model)(x, t, condition_of(batch, process.null_label))


def _one_view_an_item(scene: Scene, batch: Batch) -> Any:
    weight = next(scene.parameters())
    height, width = batch["image"].shape[-2:]
    cameras = shown_from(scene, batch.size, height, width).to(weight.device).to(weight.dtype)
    return look(scene, torch.arange(batch.size, device=weight.device) % particle_count(scene), cameras)


def _timm_stages(model: nn.Module) -> list[str]:
    """timm notes its stages in `feature_info`: a list of dictionaries, or an object that holds one in `info`."""
    noted: Any = getattr(model, "feature_info", None)
    entries = getattr(noted, "info", noted)
    if not isinstance(entries, (list, tuple)):
        return []
    names = dict(model.named_modules())
    paths = [entry["module"] for entry in entries if isinstance(entry, dict) and entry.get("module") in names]
    return list(dict.fromkeys(paths))


def _largest_list(model: nn.Module) -> list[str]:
    best, most = "", 0
    for name, module in model.named_modules():  # outer lists come before inner ones, and win a draw
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1:
            parameters = count_parameters(module)
            if parameters > most:
                best, most = name, parameters
    if not most:
        return []
    prefix = f"{best}." if best else ""
    return [prefix + name for name, _ in model.get_submodule(best).named_children()]
