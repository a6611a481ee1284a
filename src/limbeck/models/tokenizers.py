"""Which tokenizer a model goes with."""

from typing import Any

from torch import nn

_ATTRIBUTE = "limbeck_tokenizer"


def set_tokenizer(model: nn.Module, tokenizer: Any) -> None:
    """Notes on a model the tokenizer that its tokens come from; saved with the model and found by `tokenizer_of`."""
    setattr(model, _ATTRIBUTE, tokenizer)


def tokenizer_of(model: nn.Module) -> Any:
    """The tokenizer noted on a model, of transformers; None where nothing is known."""
    return getattr(model, _ATTRIBUTE, None)
