"""What a student is worth as the draft of its teacher: measured speculative decoding."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from limbeck.core.errors import IncompatibleError
from limbeck.core.teacher import LiveTeacher, Teacher
from limbeck.language.generation import prompts_of
from limbeck.language.predictions import is_masked_model
from limbeck.language.sampling import Sampling
from limbeck.language.speculative import Decoded, plain_decode, speculative_decode
from limbeck.models.seeding import seeded

if TYPE_CHECKING:
    from limbeck.data.source import Source


def evaluate_decoding(
    draft: nn.Module,
    source: "Source",
    target: "Teacher | nn.Module",
    *,
    prompts: int = 8,
    prompt_tokens: int = 32,
    max_new_tokens: int = 32,
    drafted: int = 4,
    sampling: Sampling = Sampling(),  # noqa: B008  # immutable
    seed: int = 0,
) -> dict[str, float]:
    """Continues prompts of a source with the target, alone and with the draft, and compares; the models' modes and the
    process's random streams are left alone.

    Args:
        draft: the student, a causal language model.
        source: text to take prompts from, evenly spread.
        target: the teacher, as a model or as a live teacher.
        prompts: how many.
        prompt_tokens: least tokens of a prompt, for text that has none of its own.
        max_new_tokens: tokens to write after each.
        drafted: tokens that the draft proposes at a time.
        sampling: how both draw tokens.
        seed: seed of the draws.

    Returns:
        `block_efficiency` (tokens a call of the target, from 1 to drafted + 1), `drafts_accepted` (share of the
        proposed tokens), `tokens_per_second` with the draft, `plain_tokens_per_second` without, and their ratio
        `speedup`. Nothing where there is no live target or either model is no causal one with a key-value cache.
    """
    model = target.model if isinstance(target, LiveTeacher) else target
    if not isinstance(model, nn.Module) or not all(_writes(one) for one in (model, draft)):
        return {}
    options = {"max_new_tokens": max_new_tokens, "sampling": sampling, "eos": ()}
    pairs: list[tuple[Decoded, Decoded]] = []
    try:
        with seeded(seed, "decoding"):
            for prompt in _prompts(source, prompts, prompt_tokens):
                plain = plain_decode(model, prompt, **options)  # type: ignore[arg-type]
                pairs.append((plain, speculative_decode(model, draft, prompt, drafted=drafted, **options)))  # type: ignore[arg-type]
    except IncompatibleError:
        return {}
    return _figures([plain for plain, _ in pairs], [helped for _, helped in pairs])


def _figures(plain: list[Decoded], helped: list[Decoded]) -> dict[str, float]:
    speed = sum(len(one.tokens) for one in helped) / sum(one.seconds for one in helped)
    alone = sum(len(one.tokens) for one in plain) / sum(one.seconds for one in plain)
    proposed = sum(sum(one.proposed) for one in helped)
    return {
        "block_efficiency": sum(len(one.tokens) for one in helped) / sum(one.target_calls for one in helped),
        "drafts_accepted": sum(sum(one.accepted) for one in helped) / max(1, proposed),
        "tokens_per_second": speed,
        "plain_tokens_per_second": alone,
        "speedup": speed / alone,
    }


def _prompts(source: "Source", count: int, at_least: int) -> list[torch.Tensor]:
    rows = torch.linspace(0, len(source) - 1, min(count, len(source))).long()
    found = prompts_of(source.fetch(rows), at_least)
    return [ids[mask.bool()] for ids, mask in zip(found.input_ids, found.attention_mask, strict=True)]


def _writes(model: nn.Module) -> bool:
    return hasattr(model, "generate") and not is_masked_model(model)
