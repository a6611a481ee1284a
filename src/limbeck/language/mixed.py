"""Text that two models write together: each token from a mixture of their distributions."""

import inspect
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.language.generation import Prompts, end_tokens, joined, response_lengths
from limbeck.models.modes import evaluating
from limbeck.objectives.sequence import mixed_log_probs
from limbeck.objectives.vocabulary import match_vocabulary


@torch.no_grad()
def generate_mixed(
    student: nn.Module,
    teacher: nn.Module,
    prompts: Prompts,
    *,
    share: float,
    max_new_tokens: int,
    eos: int | Collection[int] | None = None,
) -> Batch:
    """What the two write after prompts: each token drawn from share · teacher + (1 - share) · student.

    Both read the growing texts with key-value caches; with share 0 the teacher is not asked. Drawn from torch's random
    stream, without temperature, from every token that the student knows.

    Args:
        student: a causal language model of transformers.
        teacher: another one with the same tokenizer.
        prompts: see `prompts_of`.
        share: the teacher's share, in [0, 1].
        max_new_tokens: most tokens of a response; the end token counts.
        eos: ids that end a response; the student's own if absent.

    Returns:
        The batch that `generate` would return.

    Raises:
        IncompatibleError: one of them keeps no key-value cache.
    """
    ends = end_tokens(student, eos)
    device = next(student.parameters()).device
    stops = torch.tensor(sorted(ends), device=device, dtype=torch.long)
    with evaluating(student, teacher):
        readers = [_Reader(model, prompts, device) for model in ([student, teacher] if share else [student])]
        tokens: list[Tensor] = []
        fresh = prompts.input_ids.to(device).masked_fill(prompts.attention_mask.to(device) == 0, 0)
        ended = torch.zeros(len(fresh), dtype=torch.bool, device=device)
        while len(tokens) < max_new_tokens and not ended.all():
            logits = [reader.read(fresh) for reader in readers]
            fresh = torch.multinomial(spoken_log_probs(logits[0], logits[-1], share).exp(), 1)
            tokens.append(fresh)
            ended |= torch.isin(fresh.squeeze(1), stops)
    responses = torch.cat(tokens, 1)
    return joined(prompts, responses, response_lengths(responses, ends))


def spoken_log_probs(student_logits: Tensor, teacher_logits: Tensor, share: float) -> Tensor:
    """log(share · p + (1 - share) · q) over the student's vocabulary, (*, vocab); what the teacher alone knows is out.

    Args:
        student_logits: (*, vocab).
        teacher_logits: (*, vocab), of another padding perhaps.
        share: the teacher's, in [0, 1].
    """
    known = teacher_logits[..., : student_logits.shape[-1]]
    return mixed_log_probs(*match_vocabulary(student_logits, known), share)


class _Reader:
    """Reads texts that are padded on the left, computing each token once."""

    def __init__(self, model: nn.Module, prompts: Prompts, device: torch.device) -> None:
        from transformers import DynamicCache

        takes = inspect.signature(_base(model).forward).parameters
        if "past_key_values" not in takes:
            raise IncompatibleError(
                f"a {type(model).__name__} keeps no key-value cache", "use a causal model of transformers"
            )
        self.model: Any = model
        self._cache = DynamicCache()
        self._mask = prompts.attention_mask.to(device)
        self._takes_positions = "position_ids" in takes
        self._begun = False

    def read(self, ids: Tensor) -> Tensor:
        """Logits (items, vocab) after the next tokens (items, tokens): first the prompts, then one at a time."""
        if self._begun:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(ids), 1)], 1)
        self._begun = True
        # Without the padding in front; models that take no positions count them off the mask themselves.
        places = (self._mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        positions = {"position_ids": places} if self._takes_positions else {}
        output = self.model(
            input_ids=ids, attention_mask=self._mask, past_key_values=self._cache, use_cache=True, **positions
        )
        return output.logits[:, -1]


def _base(model: nn.Module) -> Any:
    unwrap: Any = getattr(model, "get_base_model", None)  # of a peft model
    return model if unwrap is None else unwrap()
