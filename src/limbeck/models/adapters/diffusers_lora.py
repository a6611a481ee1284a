"""LoRA weights in the form that stock pipelines of diffusers load."""

from pathlib import Path
from typing import Any

from torch import nn

from limbeck.core.errors import IncompatibleError
from limbeck.diffusion.denoiser import process_of
from limbeck.diffusion.ports import without_adapter
from limbeck.models.adapters.diffusers_classes import INDEX, named_class, pipeline_of, stored_scheduler
from limbeck.models.adapters.diffusers_samplers import scheduler_for
from limbeck.models.files import read_object
from limbeck.models.process_file import save_process

_PIPELINES = {
    "UNet2DConditionModel": "StableDiffusionPipeline",
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
    "FluxTransformer2DModel": "FluxPipeline",
    "SanaTransformer2DModel": "SanaPipeline",
}


def save_lora(model: nn.Module, folder: Path) -> None:
    """Writes `pytorch_lora_weights.safetensors` for a stock pipeline's `load_lora_weights`, and its `scheduler`.

    Args:
        model: a network of diffusers with one adapter of peft.
        folder: where to write.

    Raises:
        IncompatibleError: no stock pipeline takes LoRA weights for this network, or layers were trained whole.
    """
    from peft import get_peft_model_state_dict

    adapted: Any = model
    network = without_adapter(model)
    origin = pipeline_of(network)
    kind = _pipeline(network, origin)
    config = adapted.peft_config["default"]
    if config.modules_to_save:
        raise IncompatibleError("a pipeline's LoRA weights hold no layers that were trained whole", "merge the adapter")
    part = "unet" if "UNet" in type(network).__name__ else "transformer"
    weights = {
        name.removeprefix("base_model.model."): tensor.detach().cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    settings = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    kind.save_lora_weights(
        str(folder), **{f"{part}_lora_layers": weights, f"{part}_lora_adapter_metadata": _without_paths(settings)}
    )
    process = process_of(model)
    if process is not None:
        scheduler = scheduler_for(process, network, None if origin is None else stored_scheduler(origin), kind)
        if scheduler is not None:
            scheduler.save_pretrained(folder / "scheduler")
    save_process(model, folder)


def _pipeline(network: nn.Module, origin: Path | None) -> Any:
    from diffusers import DiffusionPipeline

    name = type(network).__name__
    usual = _PIPELINES.get(name)
    if name == "UNet2DConditionModel" and getattr(network, "add_embedding", None) is not None:
        usual = "StableDiffusionXLPipeline"
    known = usual if origin is None else read_object(origin / INDEX).get("_class_name")
    kind = named_class(known, DiffusionPipeline)
    if kind is None or not hasattr(kind, "save_lora_weights"):
        raise IncompatibleError(f"no stock pipeline loads LoRA weights for a {name}", "merge the adapter: merge=True")
    return kind


def _without_paths(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in ("base_model_name_or_path", "auto_mapping")}
