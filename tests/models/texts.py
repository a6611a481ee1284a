"""Tiny text and tiny language models for the tests."""

from typing import Any

import torch
from torch import nn

from limbeck.core.method import DataInfo
from limbeck.core.specs import ModelSpec
from limbeck.data.text.masking import Masking
from limbeck.data.text.source import TextSource
from limbeck.data.text.tokenizer import train_tokenizer
from limbeck.models.build import build_model

VOCAB = 60
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24},
    "gpt2": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    "bert": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24},
    "gemma2": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    | {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 8},
}
"""Configurations of about ten thousand parameters, by model type."""


def text(items: int = 24, length: int = 12, masked: bool = False, classes: int = 0, vocab: int = VOCAB) -> TextSource:
    """Random tokens with prompts and lengths of all kinds, always the same."""
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(4, vocab, (items, length), generator=draws)
    lengths = torch.randint(length // 2, length + 1, (items,), generator=draws)
    prompts = torch.randint(1, length // 2, (items, 1), generator=draws)
    return TextSource(
        ids,
        lengths,
        None if masked else torch.arange(length) >= prompts,
        vocab=vocab,
        masking=Masking(0.4, 3, vocab, torch.tensor([0, 1, 2, 3])) if masked else None,
        label=torch.arange(items) % classes if classes else None,
    )


def model(kind: str, source: TextSource | None = None, seed: int = 0, spread: float = 4.0, **changes: Any) -> nn.Module:
    """A tiny model in eval mode; `spread` multiplies its fresh weights, so that its predictions are not all alike."""
    adapter = changes.pop("adapter", None)
    info: DataInfo = (source or text(masked=kind == "bert")).info()
    spec = ModelSpec(name=f"config:{kind}", arguments={**SIZES[kind], **changes}, adapter=adapter)
    made = build_model(spec, info, seed).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim > 1 and "lora" not in name:
                parameter *= spread
    return made


def tokenizer() -> Any:
    """A byte-level tokenizer of 300 entries."""
    return train_tokenizer(["the cat sat on the mat, and a dog barked at it"] * 20, 300)
