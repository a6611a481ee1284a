"""Generation: prompts out of batches, and batches out of what a model writes after them."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.language.sampling import Sampling
from limbeck.models.modes import evaluating
from limbeck.objectives.tokens import IGNORED_LABEL


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts that end in the same column, as generation wants them.

    Attributes:
        input_ids: (items, length) padded on the left; what stands in the padding has no meaning.
        attention_mask: (items, length), 0 in the padding.
        lengths: (items,) tokens of each prompt, at least 1.
    """

    input_ids: Tensor
    attention_mask: Tensor
    lengths: Tensor

    def select(self, rows: Tensor | slice) -> "Prompts":
        """The prompts at `rows`, with no more padding than they need."""
        lengths = self.lengths[rows]
        width = int(lengths.max())
        return Prompts(self.input_ids[rows, -width:], self.attention_mask[rows, -width:], lengths)


def prompts_of(batch: Batch, at_least: int = 1) -> Prompts:
    """The prompts of a text batch: each item's tokens before its first target.

    Args:
        batch: with `input_ids` and, padded on the right, `attention_mask` and `labels`; a batch without labels is all
            prompt.
        at_least: where fewer tokens come before the first target, as in plain text, the prompt is so many tokens
            long; an item of fewer tokens is all prompt. 1 or more.
    """
    ids = batch["input_ids"]
    places = torch.arange(ids.shape[1], device=ids.device)
    sizes = batch["attention_mask"].sum(1) if "attention_mask" in batch else ids.new_full(ids.shape[:1], len(places))
    first = sizes
    if "labels" in batch:
        is_target = batch["labels"] != IGNORED_LABEL
        first = torch.where(is_target.any(1), is_target.int().argmax(1), sizes)
    lengths = first.clamp_min(at_least).minimum(sizes).clamp_min(1)
    width = int(lengths.max())
    source = places[:width] - (width - lengths).unsqueeze(1)  # negative in the padding
    return Prompts(ids.gather(1, source.clamp_min(0)), (source >= 0).long(), lengths)


def generate(
    model: nn.Module,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    num_beams: int = 1,
    eos: int | Collection[int] | None = None,
) -> Batch:
    """What a causal model of transformers writes after prompts, as a batch whose targets are the responses.

    Drawn from torch's random stream, which the trainer seeds at each step. The model is in eval mode meanwhile and no
    gradient is recorded. Through transformers' `generate`, with its key-value cache.

    Args:
        model: a causal language model, with or without an adapter.
        prompts: see `prompts_of`.
        max_new_tokens: most tokens of a response, 1 or more; the end token counts.
        temperature: divides the logits; 0 decodes greedily.
        top_k: draw from so many of the most probable tokens; None for all.
        top_p: draw from the most probable tokens that reach this probability; None for all.
        num_beams: width of a beam search, with temperature 0 its best sequence; 1 for none.
        eos: ids that end a response; the model's own if absent, none for an empty collection.

    Returns:
        `input_ids` (items, length), prompt and response without a gap, padded on the right; `attention_mask`; `labels`
        with -100 on prompt and padding; `prompt_length` and `response_length` (items,). Lengths, not ids, say where a
        response ends: it holds its end token, also where that is the padding token too.
    """
    sampling = Sampling(temperature, top_k, top_p)
    ends = end_tokens(model, eos)
    device = next(model.parameters()).device
    ids, mask = prompts.input_ids.to(device), prompts.attention_mask.to(device)
    write = _generator(model)
    with evaluating(model), _without_habits(model):
        written = write(
            input_ids=ids.masked_fill(mask == 0, 0),
            attention_mask=mask,
            generation_config=_configuration(sampling, max_new_tokens, num_beams, ends),
        )
    responses = written[:, ids.shape[1] :]
    return joined(prompts, responses, response_lengths(responses, ends))


def joined(prompts: Prompts, responses: Tensor, lengths: Tensor) -> Batch:
    """Prompts and responses as one batch; see `generate` for its fields.

    Args:
        prompts: the prompts.
        responses: (items, longest) token ids.
        lengths: (items,) how many of them count.
    """
    before = prompts.lengths.to(responses.device)
    total = before + lengths
    whole = torch.cat([prompts.input_ids.to(responses.device), responses], dim=1)
    places = torch.arange(int(total.max()), device=responses.device)
    source = places + (prompts.input_ids.shape[1] - before).unsqueeze(1)
    present = places < total.unsqueeze(1)
    ids = whole.gather(1, source.clamp_max(whole.shape[1] - 1)).masked_fill(~present, 0)
    labels = ids.masked_fill(~present | (places < before.unsqueeze(1)), IGNORED_LABEL)
    return Batch(
        {
            "input_ids": ids,
            "attention_mask": present.long(),
            "labels": labels,
            "prompt_length": before,
            "response_length": lengths,
        }
    )


def response_lengths(responses: Tensor, ends: Collection[int]) -> Tensor:
    """Tokens (items,) of responses (items, length) up to and with the first end token; all of them without one."""
    width = torch.full(responses.shape[:1], responses.shape[1], device=responses.device)
    if not ends:
        return width
    ended = torch.isin(responses, torch.tensor(sorted(ends), device=responses.device))
    return torch.where(ended.any(1), ended.int().argmax(1) + 1, width)


def end_tokens(model: nn.Module, eos: int | Collection[int] | None = None) -> list[int]:
    """The ids that end a response: those given, or else the model's own, as its configuration names them."""
    found: Any = eos
    if found is None:
        for name in ("generation_config", "config"):
            found = getattr(getattr(model, name, None), "eos_token_id", None)
            if found is not None:
                break
    if found is None:
        return []
    return [found] if isinstance(found, int) else list(found)


def _generator(model: nn.Module) -> Any:
    found: Any = getattr(model, "generate", None)
    if found is None:
        raise IncompatibleError(f"a {type(model).__name__} generates no text", "use a causal model of transformers")
    return found


@contextmanager
def _without_habits(model: nn.Module) -> Iterator[None]:
    """Hides a model's own generation configuration, which would fill in whatever is left open (top-k 50, penalties)."""
    from transformers import GenerationConfig

    unwrap: Any = getattr(model, "get_base_model", None)  # of a peft model
    base: Any = unwrap() if unwrap is not None else model
    habits = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = habits


def _configuration(sampling: Sampling, most: int, beams: int, ends: list[int]) -> Any:
    from transformers import GenerationConfig

    drawn = {"temperature": sampling.temperature, "top_k": sampling.top_k or 0, "top_p": sampling.top_p or 1.0}
    return GenerationConfig(
        max_new_tokens=most,
        do_sample=not sampling.greedy,
        num_beams=beams,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,  # what stands behind a response is cut off by its length
        use_cache=True,
        **({} if sampling.greedy else drawn),
    )
