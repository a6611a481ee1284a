"""How a batch goes into a model and what comes out: one place for all ecosystems' conventions."""

from typing import Any

from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError


def call(model: nn.Module, batch: Batch) -> Any:
    """Runs a model on the fields of its modality: `image` alone, or `input_ids` and what goes with them."""
    if "image" in batch:
        return model(batch["image"])
    if "input_ids" in batch:
        return model(**text_inputs(batch))
    raise IncompatibleError(f"no input for a model among {', '.join(batch)}", "name the tensor image or input_ids")


def text_inputs(batch: Batch) -> dict[str, Tensor | None]:
    """The fields of a text batch that a model reads, with those of a decoder that has inputs of its own."""
    further = ("decoder_input_ids", "decoder_attention_mask")
    fields: dict[str, Tensor | None] = {"input_ids": batch["input_ids"], "attention_mask": batch.get("attention_mask")}
    return fields | {name: batch[name] for name in further if name in batch}


def logits_of(output: Any) -> Tensor:
    """The logits of a model's output: a tensor as it is, `.logits` of a transformers output, else the first entry.

    Raises:
        IncompatibleError: the output holds no logits (a bare backbone, say).
    """
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        logits = output[0]
    if logits is None:
        raise IncompatibleError(
            f"a {type(output).__name__} has no logits", "use a model with a classification or language head"
        )
    return logits
