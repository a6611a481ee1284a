"""LoRA adapters by peft: on any transformers, timm or diffusers model, saved so that stock peft loads them."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from limbeck.core.durable import read_json, write_json
from limbeck.core.errors import DamagedFileError, IncompatibleError, RecipeError
from limbeck.core.specs import AdapterSpec
from limbeck.diffusion.denoiser import note_process, process_of
from limbeck.models.adapters.text import note_tokenizer, save_tokenizer
from limbeck.models.normalisation import normalisation_of, set_normalisation
from limbeck.models.process_file import load_process, save_process
from limbeck.models.seeding import seeded
from limbeck.models.structure import structural_copy
from limbeck.models.tokenizers import set_tokenizer, tokenizer_of

BASE = "base"
"""Subfolder in which a base model without a folder of its own is saved."""

_ORIGIN = "limbeck_base"
_PREPROCESSING = "preprocessing.json"
_AUTOMATIC = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification"}


def is_adapted(model: nn.Module) -> bool:
    """Whether a model is a base model with adapters of peft."""
    return any(base.__module__.startswith("peft.") for base in type(model).__mro__)


def add_adapter(
    model: nn.Module, spec: AdapterSpec, seed: int = 0, *, origin: str | None = None, key: str = "model"
) -> nn.Module:
    """The model with a fresh adapter, which alone is trainable; at first it predicts what the model does.

    Args:
        model: the base model, whose layers are wrapped in place.
        spec: the adapter.
        seed: seed of its weights.
        origin: absolute folder or hub id that holds exactly this base model; without one it is saved with the adapter.
        key: dotted path of the model in its recipe, for messages.

    Raises:
        IncompatibleError: the model has an adapter already.
        RecipeError: no layer fits `target_modules`.
    """
    from peft import LoraConfig, get_peft_model

    if is_adapted(model):
        raise IncompatibleError(f"{key}: the model has an adapter already", "remove the key adapter to train it on")
    alpha: Any = int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=alpha,
        lora_dropout=spec.dropout,
        target_modules=_targets(model, spec, key),
        exclude_modules=spec.exclude_modules or None,
        modules_to_save=spec.modules_to_save or None,
        # GPT-2's kind keeps its weights transposed.
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
        use_rslora=spec.rank_stabilised,
        use_dora=spec.decomposed,
        task_type=_task_of(model),
    )
    normalisation, tokenizer = normalisation_of(model), tokenizer_of(model)
    try:
        with seeded(seed, "adapter"), _quiet():
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise RecipeError(f"{key}.adapter.target_modules", str(error).splitlines()[0]) from error
    setattr(adapted, _ORIGIN, origin)
    _note(adapted, normalisation, tokenizer)
    return adapted


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Writes the folder that `PeftModel.from_pretrained(base, folder)` loads.

    A base model that has no folder of its own is saved in the subfolder `base`, in its own ecosystem's format.
    """
    from limbeck.models.saved import save_model

    adapted: Any = model
    origin = getattr(model, _ORIGIN, None)
    if origin is None:
        base: Any = structural_copy(model)
        base = base.unload()
        _note(base, normalisation_of(model), None)
        save_model(base, folder / BASE)
    for config in adapted.peft_config.values():
        config.base_model_name_or_path = origin or BASE
    adapted.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # a form to fill in
    save_tokenizer(model, folder)
    normalisation = normalisation_of(model)
    save_process(model, folder)
    if normalisation is not None:
        write_json(folder / _PREPROCESSING, {"mean": normalisation[0], "std": normalisation[1]})


def load_adapter(folder: Path, base: nn.Module | None = None) -> nn.Module:
    """Loads what `save_adapter` or peft wrote, its adapter trainable, on the CPU.

    Args:
        folder: holds `adapter_config.json`.
        base: the base model, whose layers are wrapped in place; loaded from where the adapter says if absent.

    Raises:
        DamagedFileError: the files are not what peft writes.
        UsageError: the base model is not where the adapter says.
    """
    from peft import PeftModel

    config = read_json(folder / "adapter_config.json")
    if not isinstance(config, dict):
        raise DamagedFileError(folder / "adapter_config.json", "not a JSON object")
    own, origin = folder / BASE, config.get("base_model_name_or_path")
    if base is None:
        base = _load_base(own if own.is_dir() else Path(str(origin)), config)
    try:
        with _quiet():
            adapted: nn.Module = PeftModel.from_pretrained(base, str(folder), is_trainable=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise DamagedFileError(folder, f"no adapter of this base model ({str(error).splitlines()[0]})") from error
    setattr(adapted, _ORIGIN, None if own.is_dir() else origin)
    preprocessing = folder / _PREPROCESSING
    if preprocessing.is_file():
        noted = read_json(preprocessing)
        set_normalisation(adapted, noted["mean"], noted["std"])
    note_tokenizer(adapted, folder)
    load_process(adapted, folder)
    return adapted


def merged(model: nn.Module) -> nn.Module:
    """A copy of the base model into whose weights the adapter is added: an ordinary model of its ecosystem.

    Raises:
        IncompatibleError: the model has no adapter.
    """
    if not is_adapted(model):
        raise IncompatibleError(f"a {type(model).__name__} has no adapter to merge")
    copied: Any = structural_copy(model, share=lambda tensor: False)
    result: nn.Module = copied.merge_and_unload()
    _note(result, normalisation_of(model), tokenizer_of(model))
    process = process_of(model)
    if process is not None:
        note_process(result, process)
    return result.requires_grad_(True)


def _targets(model: nn.Module, spec: AdapterSpec, key: str) -> list[str] | str:
    import transformers

    if spec.target_modules is not None:
        return spec.target_modules
    if isinstance(model, transformers.PreTrainedModel):
        return "all-linear"  # peft leaves the output head out
    classifier: Any = getattr(model, "get_classifier", None)
    head = classifier() if classifier is not None else getattr(model, "head", None)
    heads = {head, getattr(model, "proj_out", None)}  # the second is that of diffusers' transformers
    found = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module not in heads]
    if not found:
        raise RecipeError(
            f"{key}.adapter.target_modules", f"a {type(model).__name__} has no linear layers to adapt", "name layers"
        )
    return found


def _task_of(model: nn.Module) -> str | None:
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        return "SEQ_CLS"
    causal = name.endswith(("ForCausalLM", "LMHeadModel")) and not name.endswith("ForMaskedLM")
    return "CAUSAL_LM" if causal else None


def _load_base(origin: Path, config: dict[str, Any]) -> nn.Module:
    from limbeck.models.adapters.transformers import load_as
    from limbeck.models.saved import load_model

    mapping = config.get("auto_mapping") or {}
    if str(mapping.get("parent_library")).startswith("diffusers") and origin.name != BASE:
        from limbeck.models.adapters.diffusers import load_diffusers

        return load_diffusers(str(origin))
    named = _AUTOMATIC.get(str(config.get("task_type"))) or mapping.get("base_model_class")
    is_transformers = str(mapping.get("parent_library", "transformers")).startswith("transformers")
    if origin.name == BASE or named is None or not is_transformers or (origin / "adapter_config.json").is_file():
        return load_model(origin)
    return load_as(str(origin), named)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the announcements of transformers that peft calls forth by looking at a model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _note(model: nn.Module, normalisation: Any, tokenizer: Any) -> None:
    if normalisation is not None:
        set_normalisation(model, *normalisation)
    if tokenizer is not None:
        set_tokenizer(model, tokenizer)
