"""Predictions at the tokens that count: hidden states before the head where that is exact, logits otherwise."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.call import call, logits_of
from limbeck.core.taps import Taps
from limbeck.objectives.fused_head import DenseTeacher, HiddenTeacher, TopKTeacher
from limbeck.objectives.tokens import IGNORED_LABEL

TokenSignal = HiddenTeacher | DenseTeacher | TopKTeacher
"""What a teacher says about each kept token: hidden states and a head, logits, or its k most probable tokens."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """One model's predictions at the kept tokens of a batch: before its head, or after it.

    Attributes:
        hidden: (tokens, width), or None where only logits could be had.
        weight: (vocab, width) of the head.
        bias: (vocab,) of the head, or None.
        dense: (tokens, vocab) logits where there are no hidden states.
    """

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    dense: Tensor | None = None

    def logits(self) -> Tensor:
        """The logits (tokens, vocab), computed now if need be."""
        if self.dense is not None:
            return self.dense
        assert self.hidden is not None
        assert self.weight is not None
        return F.linear(self.hidden, self.weight, self.bias)

    def as_teacher(self) -> HiddenTeacher | DenseTeacher:
        """The same as a teacher's signal."""
        if self.dense is not None:
            return DenseTeacher(self.dense)
        assert self.hidden is not None
        assert self.weight is not None
        return HiddenTeacher(self.hidden, self.weight, self.bias)


class TokenReader:
    """Reads a language model's predictions at the kept tokens, and computes no others.

    The forward pass is ended in front of the output head, whose rows are then computed for kept tokens only, or never
    in full. That is done where the head is a plain linear layer that alone makes the logits, which is checked on the
    example; models that scale or cap their logits, adapters on the head and sharded heads take the longer way.

    Args:
        model: a causal, masked or encoder-decoder language model of transformers, adapters of peft included.
        example: a small batch to check on.
    """

    def __init__(self, model: nn.Module, example: Batch) -> None:
        self.model = model
        self.shift = 0 if is_masked_model(model) or is_encoder_decoder(model) else 1
        path = _head_path(model)
        self.head_path = path if path is not None and self._is_exact(path, example) else None

    def __call__(self, batch: Batch) -> Predictions:
        """Predictions at `kept_tokens(batch, self.shift)`, in row-major order."""
        kept = kept_tokens(batch, self.shift)
        if self.head_path is None:
            return Predictions(dense=logits_of(call(self.model, batch))[kept])
        return self._before_head(self.head_path, batch, kept)

    def _before_head(self, path: str, batch: Batch, kept: Tensor) -> Predictions:
        with Taps(self.model, [path], kind="input", stop=True) as taps:
            taps.run(batch)
            hidden = taps[path][kept]
        head: Any = self.model.get_submodule(path)
        return Predictions(hidden, head.weight, head.bias)

    @torch.no_grad()
    def _is_exact(self, path: str, example: Batch) -> bool:
        """Whether hidden states times the head are the model's logits."""
        device = next(self.model.parameters()).device
        example, training = example.to(device), self.model.training
        kept = torch.ones_like(_labels(example), dtype=torch.bool)
        self.model.eval()
        whole = logits_of(call(self.model, example))[kept].float()
        parts = self._before_head(path, example, kept).logits().float()
        self.model.train(training)
        return whole.shape == parts.shape and torch.allclose(whole, parts, rtol=1e-4, atol=1e-4)


def kept_tokens(batch: Batch, shift: int = 1) -> Tensor:
    """Positions (items, length) whose prediction counts: those whose target, `shift` further on, is a label.

    Without `labels` every token of the attention mask is a target.
    """
    wanted = _labels(batch) != IGNORED_LABEL
    kept = torch.zeros_like(wanted)
    kept[:, : wanted.shape[1] - shift] = wanted[:, shift:]
    return kept


def kept_labels(batch: Batch, shift: int = 1) -> Tensor:
    """The target ids (tokens,) of `kept_tokens`, in the same order."""
    labels = _labels(batch)[:, shift:]
    return labels[labels != IGNORED_LABEL]


def is_masked_model(model: nn.Module) -> bool:
    """Whether a model predicts the token at its own position (BERT's kind) and not the next one."""
    unwrap: Any = getattr(model, "get_base_model", None)  # of a peft model
    base = unwrap() if unwrap is not None else model
    return type(base).__name__.endswith("ForMaskedLM")


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model has a decoder with inputs of its own, whose labels are not shifted against its predictions."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _labels(batch: Batch) -> Tensor:
    if "labels" in batch:
        return batch["labels"]
    if "attention_mask" in batch:
        return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL)
    return batch["input_ids"]


def _head_path(model: nn.Module) -> str | None:
    """Path of the output head if it is a plain, whole linear layer."""
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if type(head) is not nn.Linear or hasattr(head.weight, "placements"):
        return None
    return next((path for path, module in model.named_modules() if module is head), None)
