"""What transformers' models need to know of text: kind, vocabulary, and the tokenizer that travels with them."""

from pathlib import Path
from typing import Any

from torch import nn

from limbeck.core.errors import IncompatibleError, RecipeError, did_you_mean
from limbeck.core.method import DataInfo, TextInfo
from limbeck.models.tokenizers import set_tokenizer, tokenizer_of

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id")
_FILES = ("tokenizer.json", "tokenizer_config.json")


def build_from_type(model_type: str, arguments: dict[str, Any], data: DataInfo, key: str = "model") -> nn.Module:
    """A transformers model with fresh weights, described by its type and the fields of its configuration.

    What `arguments` leave open is read from the data (vocabulary, special tokens, positions for twice the data's
    length; classes, channels and image size) and else the type's own default. The class follows the task; the argument
    `architecture` names another one.

    Raises:
        RecipeError: no such type or class, or an argument that the configuration does not know or take.
    """
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING.keys():  # noqa: SIM118  # a lazy mapping, whose own test loads the class
        raise RecipeError(f"{key}.name", f"transformers has no model type '{model_type}'", _similar(model_type))
    config_class: Any = CONFIG_MAPPING[model_type]
    given = {name: value for name, value in arguments.items() if name != "architecture"}
    usual = config_class()
    for name in given:
        if not hasattr(usual, name):
            hint = did_you_mean(name, sorted(usual.to_dict()))
            raise RecipeError(f"{key}.arguments.{name}", f"not in the configuration of '{model_type}'", hint)
    found = {name: value for name, value in fresh_fields(data).items() if hasattr(usual, name)}
    try:
        # By the type's own names: GPT-2 says n_positions for max_position_embeddings, and takes both.
        names = getattr(config_class, "attribute_map", {})
        config = config_class(**{names.get(name, name): value for name, value in (found | given).items()})
    except Exception as error:  # what configurations raise has no common class of its own
        raise RecipeError(f"{key}.arguments", _reason(error), f"see the configuration of '{model_type}'") from error
    return build_fresh(config, arguments.get("architecture"), data, key)


def build_fresh(config: Any, architecture: Any, data: DataInfo, key: str) -> nn.Module:
    """A model with fresh float32 weights from a configuration.

    Raises:
        RecipeError: no such class, or one that cannot be built from the configuration.
    """
    from limbeck.models.adapters.transformers import class_of

    model_class = class_of(config, architecture, data, key)
    try:
        model = model_class.from_config(config) if hasattr(model_class, "from_config") else model_class(config)
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise RecipeError(f"{key}.arguments", f"no {config.model_type} can be built: {_reason(error)}") from error
    return model.float()


def fresh_fields(data: DataInfo) -> dict[str, Any]:
    """Fields of a configuration that the data settle for a model with fresh weights."""
    classes = {"num_labels": data.classes} if data.classes else {}
    if data.text is not None:
        # Twice the length: generation goes on beyond it, and some types spend the first positions on padding.
        room = 2 * data.example["input_ids"].shape[1]
        return {"vocab_size": data.text.vocab, "max_position_embeddings": room, **special_tokens(data.text), **classes}
    channels, height, width = data.example["image"].shape[1:]
    return {"num_channels": channels, "image_size": height if height == width else [height, width], **classes}


def special_tokens(text: TextInfo) -> dict[str, int]:
    """Ids of the tokenizer's special tokens as a configuration calls them, those that it has."""
    found = {name: getattr(text.tokenizer, name, None) for name in _TOKENS}
    return {name: value for name, value in found.items() if value is not None}


def text_class(data: DataInfo) -> Any:
    """The automatic class for the task: classes, hidden tokens, or the next token."""
    import transformers

    assert data.text is not None
    if data.classes:
        return transformers.AutoModelForSequenceClassification
    return transformers.AutoModelForMaskedLM if data.text.masked else transformers.AutoModelForCausalLM


def check_vocabulary(config: Any, text: TextInfo, key: str) -> None:
    """Refuses a stored model whose vocabulary is smaller than the data's, as an `IncompatibleError`."""
    vocab = getattr(config.get_text_config(), "vocab_size", None)
    if vocab is not None and vocab < text.vocab:
        raise IncompatibleError(
            f"{key}: the model knows {vocab} tokens and the data have {text.vocab}",
            "set data.text.tokenizer to the model's own",
        )


def save_tokenizer(model: nn.Module, folder: Path) -> None:
    """Writes the tokenizer that is noted on a model, where there is one, so that `AutoTokenizer` loads it."""
    tokenizer = tokenizer_of(model)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def note_tokenizer(model: nn.Module, folder: Path) -> None:
    """Notes on a model the tokenizer in its folder, where there is one."""
    if any((folder / name).is_file() for name in _FILES):
        from limbeck.data.text.tokenizer import load_tokenizer

        set_tokenizer(model, load_tokenizer(str(folder), str(folder)))


def _similar(model_type: str) -> str:
    from transformers import CONFIG_MAPPING

    return did_you_mean(model_type, sorted(CONFIG_MAPPING.keys()))


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[-1]:.200}" if lines else type(error).__name__
